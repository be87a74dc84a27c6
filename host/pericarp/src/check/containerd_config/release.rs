//! How releases of containerd differ in what they read of their configuration.

/// A release line of containerd: major and minor version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release(pub u32, pub u32);

impl Release {
    /// The newest one whose configuration is known here. Newer ones are read as this one.
    pub const NEWEST_KNOWN: Self = Self(2, 4);

    /// The newest version of configuration files that it reads (`version.ConfigVersion`). It refuses newer ones.
    pub fn newest_config_version(self) -> u32 {
        if self >= Self(2, 3) { 4 } else { 3 }
    }

    /// Whether it brings each file to its newest version before it merges it with those before. Older ones merge the
    /// files as they are, and then go by the version that the last of them has.
    pub fn migrates_each_file(self) -> bool {
        self >= Self(2, 3)
    }

    /// Whether it refuses to start if an imported file has a newer version than the main file. Only 2.3 does.
    pub fn refuses_newer_imports(self) -> bool {
        self == Self(2, 3)
    }

    /// Whether a runtime can have `disable_pause_image_pull`.
    pub fn has_disable_pause_image_pull(self) -> bool {
        self >= Self(2, 4)
    }
}

impl std::fmt::Display for Release {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "containerd {}.{}", self.0, self.1)
    }
}
