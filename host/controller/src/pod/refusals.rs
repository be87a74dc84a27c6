//! What a pod may ask for and a pod in a machine of its own cannot have. It is refused when the pod is made, so that
//! nobody finds out from a container that will not start.

use pericarp_protos::cri::{
    LinuxSandboxSecurityContext, NamespaceMode, PodSandboxConfig, security_profile::ProfileType,
};

use crate::{
    spec::{APPARMOR_REMEDY, SELINUX_DEFAULT_TYPES, SELINUX_REMEDY},
    user_namespace::IdMap,
};

/// What cannot be had, and what to do instead.
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
    if let Err(error) = IdMap::of(config) {
        return Some(Refusal::of(format!("this user namespace: {error}"), "give it one range of each"));
    }
    let security = config.linux.as_ref()?.security_context.as_ref()?;
    namespaces(security).or_else(|| labels(security))
}

impl Refusal {
    fn of(what: impl Into<String>, remedy: &'static str) -> Self {
        Self { what: what.into(), remedy }
    }
}

fn namespaces(security: &LinuxSandboxSecurityContext) -> Option<Refusal> {
    let options = security.namespace_options.as_ref()?;
    let host = NamespaceMode::Node as i32;
    if options.network == host {
        return Some(Refusal::of(
            "hostNetwork",
            "the host's network would have to be inside the machine; remove hostNetwork, or use the runc runtime for \
             this pod",
        ));
    }
    for (mode, field) in [(options.pid, "hostPID"), (options.ipc, "hostIPC")] {
        if mode == host {
            return Some(Refusal::of(
                field,
                "the host's namespace is not in the machine; remove it from the pod",
            ));
        }
    }
    None
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
