use kvm_bindings::kvm_cpuid_entry2;

use super::*;

fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax: u32::MAX,
        ebx: u32::MAX,
        ecx: u32::MAX,
        edx: u32::MAX,
        ..kvm_cpuid_entry2::default()
    }
}

/// What is left of a processor that has everything.
fn restricted(leaves: &[(u32, u32)], nested: bool) -> Vec<kvm_cpuid_entry2> {
    let entries: Vec<_> = leaves.iter().map(|(function, index)| entry(*function, *index)).collect();
    let cpuid = CpuId::from_entries(&entries).unwrap();
    allowed::restrict(cpuid, nested).entries().as_slice().to_vec()
}

fn one(function: u32, index: u32) -> kvm_cpuid_entry2 {
    restricted(&[(function, index)], false)[0]
}

const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;

#[test]
fn each_vcpu_sees_its_own_apic_id() {
    let entries = [LEAF_FEATURES, LEAF_TOPOLOGY]
        .map(|function| kvm_cpuid_entry2 { function, ..kvm_cpuid_entry2::default() });
    let allowed = allowed::restrict(CpuId::from_entries(&entries).unwrap(), false);
    let cpuid = for_vcpu(&allowed, 3, 4);
    assert_eq!(cpuid.as_slice()[0].ebx >> 24, 3);
    assert_eq!(cpuid.as_slice()[0].ebx >> 16 & 0xff, 4);
    assert_eq!(cpuid.as_slice()[1].edx, 3);
    assert_ne!(cpuid.as_slice()[0].ecx & FEATURES_ECX_TSC_DEADLINE, 0);
}

#[test]
fn a_guest_has_no_virtualization_unless_it_is_allowed() {
    let leaves = [(0x1, 0), (0x8000_0001, 0), (0x8000_000a, 0)];
    let without = restricted(&leaves, false);
    assert_eq!(without.len(), 2, "the leaf of SVM's own is gone");
    assert_eq!((without[0].ecx & VMX, without[1].ecx & SVM), (0, 0));
    let with = restricted(&leaves, true);
    assert_eq!(with.len(), 3);
    assert_eq!((with[0].ecx & VMX, with[1].ecx & SVM), (VMX, SVM));
    assert_eq!(with[2], entry(0x8000_000a, 0));
}

#[test]
fn leaves_that_nobody_has_looked_at_are_removed() {
    // Counters, resource control, SGX, tracing, key locker, AMX, TDX, KVM's later ones, SEV, counters of AMD's,
    // Centaur's.
    for function in [
        0x5,
        0xa,
        0xf,
        0x10,
        0x12,
        0x14,
        0x15,
        0x19,
        0x1c,
        0x1d,
        0x1e,
        0x21,
        0x23,
        0x24,
        0x4000_0010,
        0x8000_000a,
        0x8000_001b,
        0x8000_001c,
        0x8000_001f,
        0x8000_0020,
        0x8000_0022,
        0x8000_0026,
        0xc000_0001,
    ] {
        assert_eq!(restricted(&[(function, 0)], false), [], "{function:#x}");
    }
    // Subleaves too: features to come, AMX's registers, the supervisor's.
    for (function, index) in
        [(0x7, 3), (0xd, 3), (0xd, 8), (0xd, 11), (0xd, 17), (0xd, 18), (0xd, 19), (0xd, 62)]
    {
        assert_eq!(restricted(&[(function, index)], true), [], "{function:#x}.{index}");
    }
}

#[test]
fn features_that_a_container_has_no_use_for_are_off() {
    // MONITOR, SMX, SpeedStep, debug store; HLE, RTM, MPX, tracing, SGX; WAITPKG, ENQCMD; AMX, hybrid, PCONFIG.
    let features = one(0x1, 0);
    assert_eq!(features.ecx & (1 << 3 | 1 << 6 | 1 << 7 | 1 << 2), 0);
    assert_eq!(features.edx & (1 << 21), 0);
    let more = one(0x7, 0);
    assert_eq!(more.ebx & (1 << 4 | 1 << 11 | 1 << 14 | 1 << 25 | 1 << 2), 0);
    assert_eq!(more.ecx & (1 << 5 | 1 << 29 | 1 << 30), 0);
    assert_eq!(more.edx & (1 << 22 | 1 << 24 | 1 << 25 | 1 << 15 | 1 << 18), 0);
    assert_eq!(more.eax, 2, "the highest subleaf that is known");
    // No state of AMX, MPX or the supervisor can be saved, as there is none.
    assert_eq!(one(0xd, 0).eax, 0x2e7);
    assert_eq!(one(0xd, 1).ecx, 0);
    // IBS, SKINIT, watchdog, counters, MWAITX.
    assert_eq!(
        one(0x8000_0001, 0).ecx & (1 << 10 | 1 << 12 | 1 << 13 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29),
        0
    );
}

#[test]
fn what_a_guest_boots_with_and_protects_itself_with_stays() {
    let features = one(0x1, 0);
    // X2APIC, deadline timer, AES, XSAVE, RDRAND, hypervisor; TSC, APIC, SSE2.
    for bit in [21, 24, 25, 26, 30, 31] {
        assert_ne!(features.ecx & 1 << bit, 0, "bit {bit}");
    }
    for bit in [4, 9, 26] {
        assert_ne!(features.edx & 1 << bit, 0, "bit {bit}");
    }
    // SMEP, SMAP; UMIP; MD_CLEAR, IBRS, STIBP, ARCH_CAPABILITIES, SSBD.
    let more = one(0x7, 0);
    assert_eq!(more.ebx & (1 << 7 | 1 << 20), 1 << 7 | 1 << 20);
    assert_ne!(more.ecx & 1 << 2, 0);
    for bit in [10, 26, 27, 29, 31] {
        assert_ne!(more.edx & 1 << bit, 0, "bit {bit}");
    }
    // The clock, steal time; SYSCALL, NX, long mode; topology.
    assert_eq!(one(0x4000_0001, 0).eax & (1 << 3 | 1 << 5 | 1 << 24), 1 << 3 | 1 << 5 | 1 << 24);
    assert_eq!(one(0x8000_0001, 0).edx & (1 << 11 | 1 << 20 | 1 << 29), 1 << 11 | 1 << 20 | 1 << 29);
    assert_eq!(restricted(&[(0xb, 0), (0xb, 1), (0x1f, 2), (0x8000_001e, 0)], false).len(), 4);
}

#[test]
fn the_highest_leaf_is_one_that_a_guest_may_see() {
    assert_eq!((one(0x0, 0).eax, one(0x4000_0000, 0).eax), (0x1f, 0x4000_0001));
    assert_eq!(one(0x8000_0000, 0).eax, 0x8000_0021);
    let old = CpuId::from_entries(&[kvm_cpuid_entry2 { eax: 0xd, ..entry(0, 0) }]).unwrap();
    assert_eq!(allowed::restrict(old, false).entries().as_slice()[0].eax, 0xd);
}
