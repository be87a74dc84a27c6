//! CPUID as a guest sees it: the features that KVM supports on this host and a guest may use, and the machine's
//! topology.

mod allowed;

pub use self::allowed::AllowedCpuid;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_HYPERTHREADING: u32 = 1 << 28;

/// The features that KVM supports on this host and a guest may see. `nested`: whether the guest may run virtual
/// machines itself.
pub fn allowed(kvm: &Kvm, nested: bool) -> Result<AllowedCpuid, kvm_ioctls::Error> {
    Ok(allowed::restrict(kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?, nested))
}

/// The CPUID of one vCPU in a machine of at most `vcpus`: one socket, a core for each vCPU, no threads.
pub fn for_vcpu(allowed: &AllowedCpuid, id: u8, vcpus: u8) -> CpuId {
    let mut cpuid = allowed.entries();
    let bits = vcpus.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            LEAF_FEATURES => {
                // EBX contains the initial APIC id and the number of logical processors. Its other bits stay.
                entry.ebx = entry.ebx & 0x0000_ffff | u32::from(vcpus) << 16 | u32::from(id) << 24;
                // KVM emulates the deadline timer, but does not announce it.
                entry.ecx |= FEATURES_ECX_TSC_DEADLINE | FEATURES_ECX_HYPERVISOR;
                if vcpus > 1 {
                    entry.edx |= FEATURES_EDX_HYPERTHREADING;
                } else {
                    entry.edx &= !FEATURES_EDX_HYPERTHREADING;
                }
            }
            LEAF_CACHE => {
                let level = entry.eax >> 5 & 0b111;
                let sharing = if level >= 3 { u32::from(vcpus) - 1 } else { 0 };
                entry.eax = entry.eax & 0x0000_3fff | sharing << 14 | (u32::from(vcpus) - 1) << 26;
            }
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => {
                let (shift, count, kind) = match entry.index {
                    0 => (0, 1, 1),                   // threads of a core
                    1 => (bits, u32::from(vcpus), 2), // cores of the socket
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = count;
                entry.ecx = entry.index & 0xff | kind << 8;
                entry.edx = u32::from(id);
            }
            LEAF_AMD_SIZES => {
                entry.ecx = entry.ecx & !0xf0ff | (u32::from(vcpus) - 1) | bits << 12;
            }
            LEAF_AMD_TOPOLOGY => {
                entry.eax = u32::from(id);
                entry.ebx = u32::from(id);
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests;
