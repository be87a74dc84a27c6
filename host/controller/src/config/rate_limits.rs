//! Which rate limits a pod's machine has: the node's, which its configuration sets, and those that the pod asks for by
//! annotation, which can only be tighter.

use std::num::NonZeroU64;

use pericarp_vmm::{RateLimit, RateLimits};
use thiserror::Error;

/// What the names of all annotations for rate limits begin with. A device and a quantity follow, as in
/// `io.pericarp.rate-limit.disk.bytes-per-second`.
pub const ANNOTATION_PREFIX: &str = "io.pericarp.rate-limit.";

/// A pod asks for a rate limit that it cannot have.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum RateLimitError {
    #[error(
        "annotation {annotation} is {asked}, and this node's configuration (rate_limits) allows {most} at most; ask \
         for less, or leave the annotation out"
    )]
    TooMuch { annotation: String, asked: u64, most: u64 },
    #[error("annotation {annotation} allows something beyond a rate, and no rate is set; set {missing} too")]
    BurstWithoutRate { annotation: String, missing: String },
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Bytes,
    Operations,
}

/// The rate of one device in one unit, and its burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rate {
    per_second: Option<NonZeroU64>,
    burst: Option<u64>,
}

/// A device that can have rate limits.
struct LimitedDevice {
    /// Its name in annotations.
    name: &'static str,
    units: &'static [Unit],
    limit: fn(&mut RateLimits) -> &mut RateLimit,
}

const DEVICES: [LimitedDevice; 5] = [
    LimitedDevice {
        name: "net-receive",
        units: &[Unit::Bytes, Unit::Operations],
        limit: |limits| &mut limits.net_receive,
    },
    LimitedDevice {
        name: "net-transmit",
        units: &[Unit::Bytes, Unit::Operations],
        limit: |limits| &mut limits.net_transmit,
    },
    LimitedDevice { name: "disk", units: &[Unit::Bytes, Unit::Operations], limit: |limits| &mut limits.disk },
    LimitedDevice { name: "fs", units: &[Unit::Bytes, Unit::Operations], limit: |limits| &mut limits.fs },
    LimitedDevice { name: "console", units: &[Unit::Bytes], limit: |limits| &mut limits.console },
];

impl Unit {
    const ALL: [Self; 2] = [Self::Bytes, Self::Operations];

    fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Operations => "operations",
        }
    }

    fn rate_of(self, limit: &RateLimit) -> Rate {
        match self {
            Self::Bytes => Rate { per_second: limit.bytes_per_second, burst: limit.bytes_burst },
            Self::Operations => {
                Rate { per_second: limit.operations_per_second, burst: limit.operations_burst }
            }
        }
    }

    fn set_rate(self, limit: &mut RateLimit, Rate { per_second, burst }: Rate) {
        match self {
            Self::Bytes => (limit.bytes_per_second, limit.bytes_burst) = (per_second, burst),
            Self::Operations => (limit.operations_per_second, limit.operations_burst) = (per_second, burst),
        }
    }
}

impl LimitedDevice {
    fn rate(&self, mut limits: RateLimits, unit: Unit) -> Rate {
        unit.rate_of((self.limit)(&mut limits))
    }

    fn rate_annotation(&self, unit: Unit) -> String {
        format!("{ANNOTATION_PREFIX}{}.{}-per-second", self.name, unit.name())
    }

    fn burst_annotation(&self, unit: Unit) -> String {
        format!("{ANNOTATION_PREFIX}{}.{}-burst", self.name, unit.name())
    }
}

/// Every rate that there can be.
fn rates() -> impl Iterator<Item = (&'static LimitedDevice, Unit)> {
    DEVICES.iter().flat_map(|device| device.units.iter().map(move |unit| (device, *unit)))
}

/// The names of all annotations for rate limits.
pub fn annotations() -> impl Iterator<Item = String> {
    rates().flat_map(|(device, unit)| [device.rate_annotation(unit), device.burst_annotation(unit)])
}

/// Puts what an annotation says among a pod's limits. Returns whether there is an annotation with this name.
pub fn set_annotated(limits: &mut RateLimits, annotation: &str, value: NonZeroU64) -> bool {
    for (device, unit) in rates() {
        let limit = (device.limit)(limits);
        let mut rate = unit.rate_of(limit);
        if annotation == device.rate_annotation(unit) {
            rate.per_second = Some(value);
        } else if annotation == device.burst_annotation(unit) {
            rate.burst = Some(value.get());
        } else {
            continue;
        }
        unit.set_rate(limit, rate);
        return true;
    }
    false
}

/// What is wrong with limits that are to be the node's, if anything, and what to do about it. It follows the key
/// `rate_limits` in a sentence.
pub fn mistake_in(limits: &RateLimits) -> Option<String> {
    for device in &DEVICES {
        let key = device.name.replace('-', "_");
        for unit in Unit::ALL {
            let (rate, name) = (device.rate(*limits, unit), unit.name());
            if rate != Rate::default() && !device.units.contains(&unit) {
                return Some(format!("cannot have {key}.{name}_…; this device can only be limited by bytes"));
            }
            if rate.burst.is_some() && rate.per_second.is_none() {
                return Some(format!(
                    "has {key}.{name}_burst; set {key}.{name}_per_second too, beyond which it is"
                ));
            }
        }
    }
    None
}

/// Refuses what a pod asks for if it is more than the node allows. Where the node has no limit, a pod may have any.
pub fn check(node: &RateLimits, pod: &RateLimits) -> Result<(), RateLimitError> {
    for (device, unit) in rates() {
        let (most, asked) = (device.rate(*node, unit), device.rate(*pod, unit));
        let Some(most_per_second) = most.per_second else {
            if asked.burst.is_some() && asked.per_second.is_none() {
                let (annotation, missing) = (device.burst_annotation(unit), device.rate_annotation(unit));
                return Err(RateLimitError::BurstWithoutRate { annotation, missing });
            }
            continue;
        };
        let asked_per_second = asked.per_second.map(NonZeroU64::get);
        for (annotation, asked, most) in [
            (device.rate_annotation(unit), asked_per_second, most_per_second.get()),
            (device.burst_annotation(unit), asked.burst, most.burst.unwrap_or(0)),
        ] {
            if let Some(asked) = asked.filter(|asked| *asked > most) {
                return Err(RateLimitError::TooMuch { annotation, asked, most });
            }
        }
    }
    Ok(())
}

/// The tighter one of each two limits.
pub fn tightest(node: &RateLimits, pod: &RateLimits) -> RateLimits {
    let mut limits = RateLimits::default();
    for (device, unit) in rates() {
        let (node, pod) = (device.rate(*node, unit), device.rate(*pod, unit));
        let per_second = node.per_second.into_iter().chain(pod.per_second).min();
        // Where the node has no rate, its burst says nothing.
        let of_node = node.per_second.map(|_| node.burst.unwrap_or(0));
        let burst = of_node.into_iter().chain(pod.burst).min().filter(|burst| *burst > 0);
        unit.set_rate((device.limit)(&mut limits), Rate { per_second, burst });
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes_per_second: u64, bytes_burst: u64) -> RateLimits {
        let disk = RateLimit {
            bytes_per_second: NonZeroU64::new(bytes_per_second),
            bytes_burst: Some(bytes_burst).filter(|burst| *burst > 0),
            ..RateLimit::default()
        };
        RateLimits { disk, ..RateLimits::default() }
    }

    #[test]
    fn each_annotation_sets_a_number_of_its_own() {
        let mut all = RateLimits::default();
        for (annotation, value) in annotations().zip(1..) {
            // Kubernetes allows no more characters.
            assert!(annotation.len() <= 63, "{annotation}");
            assert!(set_annotated(&mut all, &annotation, NonZeroU64::new(value).unwrap()), "{annotation}");
        }
        assert_eq!(annotations().count(), 18);
        let text = serde_json::to_string(&all).unwrap();
        for value in 1..=18 {
            assert!(text.contains(&format!(":{value},")) || text.contains(&format!(":{value}}}")), "{text}");
        }
        assert_eq!(all.disk.bytes_per_second, NonZeroU64::new(9));
        assert_eq!(all.console, RateLimit { bytes_burst: Some(18), ..all.console });
    }

    #[test]
    fn an_annotation_that_does_not_exist_sets_nothing() {
        let mut none = RateLimits::default();
        for name in [
            "",
            "disk",
            "disk.bytes",
            "disk.bytes_per_second",
            "console.operations-per-second",
            "tape.bytes-burst",
        ] {
            let annotation = format!("{ANNOTATION_PREFIX}{name}");
            assert!(!set_annotated(&mut none, &annotation, NonZeroU64::MIN), "{annotation}");
        }
        assert_eq!(none, RateLimits::default());
    }

    #[test]
    fn a_pod_may_have_what_is_tighter_than_the_nodes_limit_and_anything_where_there_is_none() {
        let (unlimited, node) = (RateLimits::default(), disk(1000, 100));
        for (pod, together) in [
            (unlimited, node),
            (disk(1000, 100), node),
            (disk(999, 0), disk(999, 100)),
            (disk(0, 1), disk(1000, 1)),
        ] {
            assert_eq!(check(&node, &pod), Ok(()));
            assert_eq!(tightest(&node, &pod), together);
        }
        assert_eq!(check(&unlimited, &disk(u64::MAX, u64::MAX)), Ok(()));
        assert_eq!(tightest(&unlimited, &disk(5, 6)), disk(5, 6));
        assert_eq!(tightest(&unlimited, &unlimited), unlimited);
    }

    #[test]
    fn a_pod_that_asks_for_more_than_the_nodes_limit_is_refused_with_both_numbers() {
        for (pod, name, asked, most) in [
            (disk(1001, 0), "disk.bytes-per-second", 1001, 1000),
            (disk(0, 101), "disk.bytes-burst", 101, 100),
        ] {
            let error = check(&disk(1000, 100), &pod).unwrap_err();
            let annotation = format!("{ANNOTATION_PREFIX}{name}");
            assert_eq!(error, RateLimitError::TooMuch { annotation, asked, most });
            // If the node has changed its mind meanwhile, its limit holds nevertheless.
            assert_eq!(tightest(&disk(1000, 100), &pod), disk(1000, 100));
        }
        assert!(check(&disk(1000, 0), &disk(0, 1)).is_err());
    }

    #[test]
    fn a_burst_beyond_no_rate_is_a_mistake() {
        let error = check(&RateLimits::default(), &disk(0, 1)).unwrap_err().to_string();
        assert!(error.contains("disk.bytes-burst") && error.contains("disk.bytes-per-second"), "{error}");
        let mistake = mistake_in(&disk(0, 1)).unwrap();
        assert!(
            mistake.contains("disk.bytes_burst") && mistake.contains("disk.bytes_per_second"),
            "{mistake}"
        );
        assert_eq!(mistake_in(&disk(1, 1)), None);
    }

    #[test]
    fn a_console_can_only_be_limited_by_bytes() {
        let console = RateLimit { operations_per_second: NonZeroU64::new(1), ..RateLimit::default() };
        let mistake = mistake_in(&RateLimits { console, ..RateLimits::default() }).unwrap();
        assert!(mistake.contains("console.operations"), "{mistake}");
    }
}
