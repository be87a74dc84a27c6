//! What a pod may ask for and a pod in a machine of its own cannot have. It is refused when the pod is made, so that
//! nobody finds out from a container that will not start.

use pericarp_protos::cri::{
    LinuxSandboxSecurityContext, NamespaceMode, PodSandboxConfig, security_profile::ProfileType,
};

use super::{
    cri_fields::{self, Unknown},
    pod_spec,
};
use crate::guest::translate::{APPARMOR_REMEDY, SELINUX_DEFAULT_TYPES, SELINUX_REMEDY};

/// Something that a pod cannot have, and what to do instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In the words of the pod's author.
    pub what: String,
    /// Why not, and what to do.
    pub remedy: &'static str,
}

/// The first thing that the pod asks for and cannot have.
pub fn refusal(config: &PodSandboxConfig) -> Option<Refusal> {
    if config.windows.is_some() {
        return Some(Refusal::of("a Windows pod", "the guest is Linux; remove the windows section"));
    }
    let security = config.linux.as_ref()?.security_context.as_ref()?;
    if let Some(refusal) = namespaces(security) {
        return Some(refusal);
    }
    if let Err(error) = pod_spec::id_map(config) {
        return Some(Refusal::of(format!("this user namespace: {error}"), "give it one range of each"));
    }
    labels(security)
}

impl Refusal {
    fn of(what: impl Into<String>, remedy: &'static str) -> Self {
        Self { what: what.into(), remedy }
    }

    /// Of what CRI, as it is known here, has no name for.
    pub fn of_unknown(unknown: &Unknown) -> Self {
        Self::of(unknown.to_string(), cri_fields::REMEDY)
    }
}

/// The kinds of namespaces: what a pod's author calls the host's, and the modes that a pod can have.
const NAMESPACES: [(&str, Option<&str>, &[NamespaceMode]); 4] = [
    ("network", Some("hostNetwork"), &[NamespaceMode::Pod]),
    ("pid", Some("hostPID"), &[NamespaceMode::Pod, NamespaceMode::Container]),
    ("ipc", Some("hostIPC"), &[NamespaceMode::Pod]),
    ("user", None, &[NamespaceMode::Pod, NamespaceMode::Node]),
];

fn namespaces(security: &LinuxSandboxSecurityContext) -> Option<Refusal> {
    let options = security.namespace_options.as_ref()?;
    let user = options.userns_options.as_ref().map_or(NamespaceMode::Node as i32, |user| user.mode);
    let modes = [options.network, options.pid, options.ipc, user];
    NAMESPACES.into_iter().zip(modes).find_map(|((kind, of_host, can_be), mode)| {
        if can_be.iter().any(|known| *known as i32 == mode) {
            return None;
        }
        Some(match (NamespaceMode::try_from(mode), of_host) {
            (Ok(NamespaceMode::Node), Some("hostNetwork")) => Refusal::of(
                "hostNetwork",
                "the host's network would have to be inside the machine; remove hostNetwork, or use the runc runtime \
                 for this pod",
            ),
            (Ok(NamespaceMode::Node), Some(field)) => {
                Refusal::of(field, "the host's namespace is not in the machine; remove it from the pod")
            }
            (Ok(named), _) => Refusal::of(
                format!("the mode {} for its {kind} namespace", named.as_str_name()),
                "a pod's namespaces are its own or, for users, the host's; ask for POD",
            ),
            (Err(_), _) => Refusal::of(
                format!("the mode {mode} for its {kind} namespace"),
                "CRI has no such mode; ask for POD",
            ),
        })
    })
}

fn labels(security: &LinuxSandboxSecurityContext) -> Option<Refusal> {
    if let Some(options) = &security.selinux_options
        && !options.r#type.is_empty()
        && !SELINUX_DEFAULT_TYPES.contains(&options.r#type.as_str())
    {
        return Some(Refusal::of(format!("the SELinux type {:?}", options.r#type), SELINUX_REMEDY));
    }
    let profile = security.apparmor.as_ref()?;
    if profile.profile_type == ProfileType::Localhost as i32 {
        return Some(Refusal::of(
            format!("the AppArmor profile {:?}", profile.localhost_ref),
            APPARMOR_REMEDY,
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use pericarp_protos::cri::{
        IdMapping, LinuxPodSandboxConfig, NamespaceOption, SeLinuxOption, SecurityProfile, UserNamespace,
    };

    use super::*;
    use crate::edge::containerd::pod_spec::POD_CONFIG_TYPE;

    fn asking_for(change: impl FnOnce(&mut LinuxSandboxSecurityContext)) -> Option<String> {
        let mut security = LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption::default()),
            ..LinuxSandboxSecurityContext::default()
        };
        change(&mut security);
        let linux =
            LinuxPodSandboxConfig { security_context: Some(security), ..LinuxPodSandboxConfig::default() };
        let config = PodSandboxConfig { linux: Some(linux), ..PodSandboxConfig::default() };
        refusal(&config).map(|refusal| refusal.what)
    }

    fn options(security: &mut LinuxSandboxSecurityContext) -> &mut NamespaceOption {
        security.namespace_options.get_or_insert_default()
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_their_name_in_a_pod() {
        let host = NamespaceMode::Node as i32;
        assert_eq!(asking_for(|security| options(security).network = host).as_deref(), Some("hostNetwork"));
        assert_eq!(asking_for(|security| options(security).pid = host).as_deref(), Some("hostPID"));
        assert_eq!(asking_for(|security| options(security).ipc = host).as_deref(), Some("hostIPC"));
        assert_eq!(asking_for(|security| options(security).pid = NamespaceMode::Container as i32), None);
    }

    /// Sets the mode of one kind of namespace.
    type SetMode = fn(&mut NamespaceOption, i32);

    #[test]
    fn a_mode_of_a_namespace_that_a_pod_cannot_have_is_refused_by_its_name() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let kinds: [(&str, SetMode, &[NamespaceMode]); 4] = [
            ("network", |options, mode| options.network = mode, &[Pod]),
            ("pid", |options, mode| options.pid = mode, &[Pod, Container]),
            ("ipc", |options, mode| options.ipc = mode, &[Pod]),
            ("user", set_user, &[Pod, Node]),
        ];
        for (kind, set, can_be) in kinds {
            for mode in [Pod, Container, Node, Target] {
                let refused = asking_for(|security| set(options(security), mode as i32));
                let name = mode.as_str_name();
                match refused {
                    None => assert!(can_be.contains(&mode), "{kind} {name}"),
                    Some(what) if mode == Node => assert!(what.starts_with("host"), "{what}"),
                    Some(what) => assert_eq!(what, format!("the mode {name} for its {kind} namespace")),
                }
                assert!(
                    !can_be.contains(&mode)
                        || asking_for(|security| set(options(security), mode as i32)).is_none()
                );
            }
            let unknown = asking_for(|security| set(options(security), 9));
            assert_eq!(unknown, Some(format!("the mode 9 for its {kind} namespace")));
        }
    }

    fn set_user(options: &mut NamespaceOption, mode: i32) {
        let ids = vec![IdMapping { host_id: 65536, container_id: 0, length: 65536 }];
        options.userns_options = Some(UserNamespace { mode, uids: ids.clone(), gids: ids });
    }

    /// Every field of a pod's configuration that has an enumeration's values.
    const ENUMERATIONS: [&str; 8] = [
        "port_mappings[0].protocol",
        "linux.security_context.namespace_options.network",
        "linux.security_context.namespace_options.pid",
        "linux.security_context.namespace_options.ipc",
        "linux.security_context.namespace_options.userns_options.mode",
        "linux.security_context.seccomp.profile_type",
        "linux.security_context.apparmor.profile_type",
        "linux.security_context.supplemental_groups_policy",
    ];

    #[test]
    fn a_value_that_an_enumeration_does_not_have_is_refused_with_its_fields_name() {
        let mut fields = cri_fields::enumerations(POD_CONFIG_TYPE);
        fields.retain(|(path, ..)| !path.starts_with("windows."));
        let mut paths: Vec<_> = fields.iter().map(|(path, ..)| path.as_str()).collect();
        let mut expected = ENUMERATIONS;
        paths.sort_unstable();
        expected.sort_unstable();
        assert_eq!(paths, expected, "CRI has other fields now; decide what each of their values means here");
        for (path, message, _) in &fields {
            let unknown = cri_fields::unknown_in_message(POD_CONFIG_TYPE, message).unwrap();
            let refusal = Refusal::of_unknown(&unknown.unwrap());
            assert_eq!(refusal.what, format!("the value 99 of CRI's field {path}"));
        }
    }

    #[test]
    fn a_user_namespace_has_one_range_of_ids() {
        let with = |ranges: usize| {
            asking_for(|security| {
                let range = IdMapping { host_id: 65536, container_id: 0, length: 65536 };
                let ids = vec![range; ranges];
                let mode = NamespaceMode::Pod as i32;
                options(security).userns_options = Some(UserNamespace { mode, uids: ids.clone(), gids: ids });
            })
        };
        assert_eq!(with(1), None);
        assert!(with(0).is_some_and(|what| what.contains("user namespace")));
        assert!(with(2).is_some());
    }

    #[test]
    fn labels_that_somebody_chose_are_refused_and_defaults_are_not() {
        let typed = |kind: &str| {
            asking_for(|security| {
                security.selinux_options =
                    Some(SeLinuxOption { r#type: kind.into(), ..SeLinuxOption::default() });
            })
        };
        assert_eq!(typed(""), None);
        assert_eq!(typed("container_t"), None);
        assert!(typed("my_app_t").is_some_and(|what| what.contains("my_app_t")));
        let profile = |kind: ProfileType| {
            asking_for(|security| {
                let profile_type = kind as i32;
                security.apparmor = Some(SecurityProfile { profile_type, localhost_ref: "k8s-nginx".into() });
            })
        };
        assert_eq!(profile(ProfileType::RuntimeDefault), None);
        assert_eq!(profile(ProfileType::Unconfined), None);
        assert!(profile(ProfileType::Localhost).is_some_and(|what| what.contains("k8s-nginx")));
    }
}
