//! Facts of the guest that controller, machine and agent must agree on.

/// vsock port on which the agent serves containerd and the controller.
pub const AGENT_PORT: u32 = 1024;

/// vsock port on the host (CID 2) on which the controller waits for the agent's first word, and for nothing else: there
/// is no such port any more once that has been said.
pub const HOST_PORT: u32 = 1025;

/// vsock port on which the agent takes connections to the pod's localhost, which come from the machine. Each begins
/// with the TCP port, two bytes in network order; the agent returns one byte 0 once it has connected there, and
/// from then on the stream is that connection.
pub const FORWARD_PORT: u32 = 1026;

/// vsock port on which the agent takes the controller's connection, on which it then asks the controller (the one who
/// has connected is the one who serves). The agent has this port before there is anybody else in the guest, so who
/// answers there is the agent; any process may connect to the host.
pub const REQUESTS_PORT: u32 = 1027;

/// Tag of the virtio-fs device that carries the pod's share.
pub const SHARE_TAG: &str = "share";

/// Where the guest mounts the share. A container's root filesystem is
/// `<SHARE_DIR>/<container id>/rootfs`, a volume `<SHARE_DIR>/<VOLUMES>/<name>`.
pub const SHARE_DIR: &str = "/run/pericarp/share";

/// The share's directory of the pod's volumes.
pub const VOLUMES: &str = ".volumes";

/// Where the agent mounts the pod's volumes in memory, `<MEMORY_DIR>/<name>`.
pub const MEMORY_DIR: &str = "/run/pericarp/memory";

/// Where the agent writes the pod's `hosts`, `resolv.conf` and `hostname`.
pub const ETC_DIR: &str = "/run/pericarp/etc";

/// The pod's shared memory file system, mounted on every container's `/dev/shm`.
pub const SHM_DIR: &str = "/run/pericarp/shm";

/// The PID namespace of the pod, for containers that share one. The agent makes it when a spec
/// first names it.
pub const PID_NAMESPACE: &str = "/run/pericarp/ns/pid";

/// The pod's other namespaces, if it has a user namespace; that owns them. The agent makes them before there are
/// containers.
pub const USER_NAMESPACE: &str = "/run/pericarp/ns/user";
/// The network namespace in it.
pub const NETWORK_NAMESPACE: &str = "/run/pericarp/ns/net";
/// The IPC namespace in it.
pub const IPC_NAMESPACE: &str = "/run/pericarp/ns/ipc";
/// The UTS namespace in it.
pub const UTS_NAMESPACE: &str = "/run/pericarp/ns/uts";

/// Parent of every container's cgroup in the guest; `cgroupsPath` is `<CGROUP_PARENT>/<container id>`.
pub const CGROUP_PARENT: &str = "/pod";
