//! Sets of the host's CPUs or memory nodes, as the kernel writes them (cpuset(7), "List format").

use std::{collections::BTreeSet, fmt};

/// More than any kernel has (`CONFIG_NR_CPUS`).
const MOST: u32 = 8192;

/// Numbers of CPUs or memory nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// Reads a list such as `0-3,7`. `None` if it is none.
    pub fn parse(list: &str) -> Option<CpuSet> {
        let mut set = BTreeSet::new();
        for part in list.trim().split(',').filter(|part| !part.is_empty()) {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to): (u32, u32) = (from.parse().ok()?, to.parse().ok()?);
            if from > to || to >= MOST {
                return None;
            }
            set.extend(from..=to);
        }
        Some(CpuSet(set))
    }

    /// Whether there is no number in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What several may use together: all that any of them may, and no set at all as soon as one has none.
    pub fn together<'a>(sets: impl IntoIterator<Item = &'a CpuSet>) -> CpuSet {
        let mut all = CpuSet::default();
        for set in sets {
            if set.is_empty() {
                return CpuSet::default();
            }
            all.0.extend(&set.0);
        }
        all
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<_> = self.0.iter().map(u32::to_string).collect();
        formatter.write_str(&numbers.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_the_kernel_means_it() {
        for (list, meant) in [("", ""), ("3", "3"), ("0-2,7", "0,1,2,7"), (" 5,4\n", "4,5"), ("1,1-2", "1,2")]
        {
            assert_eq!(CpuSet::parse(list).unwrap().to_string(), meant, "{list}");
        }
        for nonsense in ["x", "1-", "-1", "2-1", "0-99999999", "1 2"] {
            assert_eq!(CpuSet::parse(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_container_without_a_set_keeps_its_pod_from_being_pinned() {
        let [one, two, none] = ["1", "2-3", ""].map(|list| CpuSet::parse(list).unwrap());
        assert_eq!(CpuSet::together([&one, &two]).to_string(), "1,2,3");
        assert!(CpuSet::together([&one, &none]).is_empty());
        assert!(CpuSet::together([]).is_empty());
    }
}
