//! The part of CPUID that a guest may see: instruction sets, what the kernel needs to protect itself, sizes and names.
//! Everything else is hidden: virtualization, performance counters, tracing, resource control, enclaves, memory
//! encryption, transactional memory, AMX, waiting in user mode, and all features that this list does not name.
//! Firecracker's CPU templates hide much the same.
//!
//! Sources: Intel SDM volume 2A (CPUID), AMD APM volume 3 appendix E, Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// The bits of one leaf that a guest sees as KVM reports them.
struct Leaf {
    function: u32,
    /// The first subleaf and the last.
    subleaves: (u32, u32),
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// All bits of a register.
const ALL: u32 = u32::MAX;
/// All subleaves, for leaves whose number of subleaves depends on the processor.
const ANY: (u32, u32) = (0, u32::MAX);
/// The highest basic leaf that a guest sees.
const LAST_BASIC: u32 = 0x1f;
/// The highest extended leaf that a guest sees.
const LAST_EXTENDED: u32 = 0x8000_0021;
/// The highest subleaf of leaf 7 that a guest sees.
const LAST_FEATURES: u32 = 2;

/// A register with these bits.
const fn bits(list: &[u32]) -> u32 {
    let (mut bits, mut at) = (0, 0);
    while at < list.len() {
        bits |= 1 << list[at];
        at += 1;
    }
    bits
}

/// A leaf without subleaves that a guest sees completely.
const fn whole(function: u32) -> Leaf {
    whole_in(function, (0, 0))
}

/// A leaf of which a guest sees the given subleaves completely.
const fn whole_in(function: u32, subleaves: (u32, u32)) -> Leaf {
    Leaf { function, subleaves, eax: ALL, ebx: ALL, ecx: ALL, edx: ALL }
}

/// What every guest may see.
#[rustfmt::skip]
const ALLOWED: &[Leaf] = &[
    // Highest leaf, and the vendor.
    whole(0x0),
    Leaf {
        function: 0x1,
        subleaves: (0, 0),
        // Family, model and stepping; brand, CLFLUSH size, APIC id.
        eax: 0x0fff_3fff,
        ebx: ALL,
        // SSE3, PCLMUL, SSSE3, FMA, CX16, PCID, SSE4.1 and 4.2, X2APIC, MOVBE, POPCNT, deadline timer, AES, XSAVE,
        // OSXSAVE, AVX, F16C, RDRAND, hypervisor.
        ecx: bits(&[0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]),
        // FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH, MMX, FXSR,
        // SSE, SSE2, self-snoop, hyper-threading.
        edx: bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27, 28]),
    },
    // Caches.
    whole(0x2),
    whole_in(0x4, ANY),
    // The local APIC's timer never stops.
    Leaf { function: 0x6, subleaves: (0, 0), eax: bits(&[2]), ebx: 0, ecx: 0, edx: 0 },
    Leaf {
        function: 0x7,
        subleaves: (0, 0),
        // Highest subleaf.
        eax: ALL,
        // FSGSBASE, TSC_ADJUST, BMI1, AVX2, what the FPU's exceptions save (6, 13), SMEP, BMI2, ERMS, INVPCID, AVX512
        // F, DQ, IFMA, PF, ER, CD, BW, VL, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
        ebx: bits(&[0, 1, 3, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31]),
        // AVX512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ, UMIP, PKU, OSPKE, GFNI, VAES, VPCLMULQDQ, LA57, RDPID, CLDEMOTE,
        // MOVDIRI, MOVDIR64B.
        ecx: bits(&[1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 14, 16, 22, 25, 27, 28]),
        // AVX512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16, FSRM, SERIALIZE; against speculation: SRBDS_CTRL, MD_CLEAR, IBRS,
        // STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
        edx: bits(&[2, 3, 4, 8, 9, 10, 14, 23, 26, 27, 28, 29, 31]),
    },
    Leaf {
        function: 0x7,
        subleaves: (1, 1),
        // SHA512, SM3, SM4, AVX-VNNI, AVX512-BF16, CMPCCXADD, fast string instructions (10 to 12), AVX-IFMA.
        eax: bits(&[0, 1, 2, 4, 5, 7, 10, 11, 12, 23]),
        ebx: 0,
        ecx: 0,
        // AVX-VNNI-INT8 and INT16, AVX-NE-CONVERT, PREFETCHI.
        edx: bits(&[4, 5, 10, 14]),
    },
    // Against speculation: PSFD, IPRED, RRSBA, DDPD_U, BHI, MCDT_NO.
    Leaf { function: 0x7, subleaves: (2, 2), eax: 0, ebx: 0, ecx: 0, edx: bits(&[0, 1, 2, 3, 4, 5]) },
    // Topology.
    whole_in(0xb, ANY),
    whole_in(0x1f, ANY),
    // Register state: x87, SSE, AVX, AVX512, PKRU, and none of the supervisor's.
    Leaf { function: 0xd, subleaves: (0, 0), eax: bits(&[0, 1, 2, 5, 6, 7, 9]), ebx: ALL, ecx: ALL, edx: 0 },
    // XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES.
    Leaf { function: 0xd, subleaves: (1, 1), eax: bits(&[0, 1, 2, 3]), ebx: ALL, ecx: 0, edx: 0 },
    whole_in(0xd, (2, 2)),
    whole_in(0xd, (5, 7)),
    whole_in(0xd, (9, 9)),

    // KVM's signature, and what it does for its guests: clocks (0, 3, 24), no I/O delays, asynchronous page faults (4,
    // 14), steal time, end of interrupt, kicks, TLB flushes, interrupts to many, polling, yielding, 15-bit destination
    // ids.
    whole(0x4000_0000),
    Leaf {
        function: 0x4000_0001,
        subleaves: (0, 0),
        eax: bits(&[0, 1, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 15, 24]),
        ebx: 0,
        ecx: 0,
        edx: 0,
    },

    // Highest extended leaf, and AMD's vendor.
    whole(0x8000_0000),
    Leaf {
        function: 0x8000_0001,
        subleaves: (0, 0),
        eax: ALL,
        ebx: ALL,
        // LAHF, CMP_LEGACY, CR8, ABM, SSE4A, MISALIGNSSE, PREFETCHW, OSVW, XOP, FMA4, TBM, TOPOEXT.
        ecx: bits(&[0, 1, 4, 5, 6, 7, 8, 9, 11, 16, 21, 22]),
        // What leaf 1 has too on AMD's; SYSCALL, NX, MMXEXT, FXSR_OPT, pages of 1 GiB, RDTSCP, long mode, 3DNow.
        edx: bits(&[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24, 11, 20, 22, 25, 26, 27, 29, 30, 31,
        ]),
    },
    // The processor's name.
    whole(0x8000_0002),
    whole(0x8000_0003),
    whole(0x8000_0004),
    // Caches and TLBs.
    whole(0x8000_0005),
    whole(0x8000_0006),
    // The TSC's rate does not change.
    Leaf { function: 0x8000_0007, subleaves: (0, 0), eax: 0, ebx: 0, ecx: 0, edx: bits(&[8]) },
    Leaf {
        function: 0x8000_0008,
        subleaves: (0, 0),
        // Sizes of addresses.
        eax: ALL,
        // CLZERO, XSAVEERPTR, WBNOINVD; against speculation: IBPB, IBRS, STIBP and how they are best used, SSBD,
        // VIRT_SSBD, SSB_NO, PSFD, BTC_NO, IBPB_RET.
        ebx: bits(&[0, 2, 9, 12, 14, 15, 16, 17, 18, 19, 24, 25, 26, 28, 29, 30]),
        // Number of threads.
        ecx: ALL,
        edx: 0,
    },
    whole(0x8000_0019),
    whole(0x8000_001a),
    whole_in(0x8000_001d, ANY),
    whole(0x8000_001e),
    Leaf {
        function: 0x8000_0021,
        subleaves: (0, 0),
        // NO_NESTED_DATA_BP, WRMSR_XX_BASE_NS, LFENCE_RDTSC, VERW_CLEAR, NULL_SEL_CLR_BASE, AUTOIBRS, NO_SMM_CTL_MSR,
        // PREFETCHI; against speculation: SBPB, IBPB_BRTYPE, SRSO_NO, SRSO_USER_KERNEL_NO.
        eax: bits(&[0, 1, 2, 5, 6, 8, 9, 20, 27, 28, 29, 30]),
        ebx: 0,
        // TSA_SQ_NO, TSA_L1_NO.
        ecx: bits(&[1, 2]),
        edx: 0,
    },
];

/// What a guest that may run virtual machines itself sees besides: VMX, SVM and its leaf, and KVM's page faults for
/// those.
#[rustfmt::skip]
const NESTED: &[Leaf] = &[
    Leaf { function: 0x1, subleaves: (0, 0), eax: 0, ebx: 0, ecx: bits(&[5]), edx: 0 },
    Leaf { function: 0x4000_0001, subleaves: (0, 0), eax: bits(&[10]), ebx: 0, ecx: 0, edx: 0 },
    Leaf { function: 0x8000_0001, subleaves: (0, 0), eax: 0, ebx: 0, ecx: bits(&[2]), edx: 0 },
    whole(0x8000_000a),
];

/// The part of CPUID that a guest may see, as [`restrict`] returns it.
pub struct AllowedCpuid(CpuId);

impl AllowedCpuid {
    /// All entries.
    pub fn entries(&self) -> CpuId {
        self.0.clone()
    }
}

/// Removes from `cpuid` what a guest may not see. `nested`: whether the guest may run virtual machines itself.
pub fn restrict(mut cpuid: CpuId, nested: bool) -> AllowedCpuid {
    cpuid.retain(|entry| leaves(nested).any(|leaf| leaf.is_of(entry)));
    for entry in cpuid.as_mut_slice() {
        let (mut eax, mut ebx, mut ecx, mut edx) = (0, 0, 0, 0);
        for leaf in leaves(nested).filter(|leaf| leaf.is_of(entry)) {
            eax |= leaf.eax;
            ebx |= leaf.ebx;
            ecx |= leaf.ecx;
            edx |= leaf.edx;
        }
        entry.eax &= eax;
        entry.ebx &= ebx;
        entry.ecx &= ecx;
        entry.edx &= edx;
        entry.eax = match (entry.function, entry.index) {
            (0x0, _) => entry.eax.min(LAST_BASIC),
            (0x7, 0) => entry.eax.min(LAST_FEATURES),
            (0x4000_0000, _) => 0x4000_0001,
            (0x8000_0000, _) => entry.eax.min(LAST_EXTENDED),
            _ => entry.eax,
        };
    }
    AllowedCpuid(cpuid)
}

fn leaves(nested: bool) -> impl Iterator<Item = &'static Leaf> {
    ALLOWED.iter().chain(if nested { NESTED } else { &[] })
}

impl Leaf {
    /// Whether an entry is of this leaf and one of its subleaves.
    fn is_of(&self, entry: &kvm_cpuid_entry2) -> bool {
        let (first, last) = self.subleaves;
        self.function == entry.function && (first..=last).contains(&entry.index)
    }
}
