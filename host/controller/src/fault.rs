//! Points at which a test stops the controller, as if it had crashed there, or holds it up.
//!
//! They act only with the feature `fault-points`, which no package of Pericarp is built with.

#[cfg(feature = "fault-points")]
mod requested;

/// Where the controller can be stopped or held up: after what the name says, and before an undo step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    PodRecordedFirst,
    DirectoryMade,
    NetworkMade,
    MachineSpawned,
    RecordWritten,
    MachineRecorded,
    GuestReady,
    PodRecorded,
    MachineEnded,
    EndRecorded,
    Adopting,
    ContainerLookedUp,
    DiskInserted,
    ContainerPrepared,
    ContainerReleased,
    EventHandedOn,
    UndoMachine,
    UndoCgroup,
    UndoNetwork,
    UndoDirectory,
    PodRemoved,
}

impl FaultPoint {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::PodRecordedFirst,
        Self::DirectoryMade,
        Self::NetworkMade,
        Self::MachineSpawned,
        Self::RecordWritten,
        Self::MachineRecorded,
        Self::GuestReady,
        Self::PodRecorded,
        Self::MachineEnded,
        Self::EndRecorded,
        Self::Adopting,
        Self::ContainerLookedUp,
        Self::DiskInserted,
        Self::ContainerPrepared,
        Self::ContainerReleased,
        Self::EventHandedOn,
        Self::UndoMachine,
        Self::UndoCgroup,
        Self::UndoNetwork,
        Self::UndoDirectory,
        Self::PodRemoved,
    ];

    /// Its name for tests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PodRecordedFirst => "pod-recorded-first",
            Self::DirectoryMade => "directory-made",
            Self::NetworkMade => "network-made",
            Self::MachineSpawned => "machine-spawned",
            Self::RecordWritten => "record-written",
            Self::MachineRecorded => "machine-recorded",
            Self::GuestReady => "guest-ready",
            Self::PodRecorded => "pod-recorded",
            Self::MachineEnded => "machine-ended",
            Self::EndRecorded => "end-recorded",
            Self::Adopting => "adopting",
            Self::ContainerLookedUp => "container-looked-up",
            Self::DiskInserted => "disk-inserted",
            Self::ContainerPrepared => "container-prepared",
            Self::ContainerReleased => "container-released",
            Self::EventHandedOn => "event-handed-on",
            Self::UndoMachine => "undo-machine",
            Self::UndoCgroup => "undo-cgroup",
            Self::UndoNetwork => "undo-network",
            Self::UndoDirectory => "undo-directory",
            Self::PodRemoved => "pod-removed",
        }
    }

    /// Stops or holds up the controller if a test has asked for that here.
    #[cfg(feature = "fault-points")]
    pub fn reached(self) {
        requested::act(self);
    }

    /// Does nothing.
    #[cfg(not(feature = "fault-points"))]
    pub fn reached(self) {
        let _ = self;
    }
}

/// What a test wants the next machine to do as if it had been captured: an environment variable of the machine.
#[cfg(feature = "fault-points")]
pub fn requested_attack() -> Option<(&'static str, String)> {
    Some((pericarp_vmm::ATTACK_VARIABLE, requested::claim_attack()?))
}

/// None.
#[cfg(not(feature = "fault-points"))]
pub fn requested_attack() -> Option<(&'static str, String)> {
    None
}

/// Each point by its name, for [`FaultPoint::ALL`] and a test to be of one mind.
#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_fault_point_has_a_name_of_its_own() {
        let names: HashSet<_> = FaultPoint::ALL.into_iter().map(FaultPoint::name).collect();
        assert_eq!(names.len(), FaultPoint::ALL.len());
    }
}
