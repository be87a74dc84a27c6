//! emptyDirs in memory, which are file systems of the guest's own.

use pericarp_protos::{
    guest::MEMORY_DIR,
    host::{Directory, MemoryVolume},
};
use serde_json::{Map, Value};

use super::{Error, Pod};
use crate::host::{
    empty_dir::{MemoryEmptyDir, PreparedDirectory},
    share::volume::{IdMapping, Volume},
    user_namespace::{IdMap, IdRange},
};

/// The id of whoever has none in a user namespace (kernel: `DEFAULT_OVERFLOWUID`). It is none of the pod's in the guest
/// either, so a container sees it as the same.
const OVERFLOW_ID: u32 = 65534;

/// Makes a bind mount of an emptyDir in memory into one of the guest's volume, and returns that volume; `None` if the
/// source is something else.
pub(super) fn translate(
    mount: &mut Map<String, Value>,
    volume: &Volume,
    pod: &Pod,
) -> Result<Option<MemoryVolume>, Error> {
    // kubelet maps the ids of all volumes of a pod with a user namespace.
    if pod.id_map.is_some() && volume.ids == IdMapping::Host {
        return Ok(None);
    }
    let found = (pod.memory_empty_dir)(&volume.source, &pod.uid);
    let found =
        found.map_err(|source| Error::MemoryVolume { destination: volume.destination.clone(), source });
    let Some(empty_dir) = found? else { return Ok(None) };
    let MemoryEmptyDir { name, size_bytes, inodes, sub_path, directories } = empty_dir;
    let mut path = format!("{MEMORY_DIR}/{name}");
    if !sub_path.is_empty() {
        path = format!("{path}/{sub_path}");
    }
    mount.insert("source".into(), path.into());
    let directories = directories.into_iter().map(|directory| in_guest(directory, pod.id_map.as_ref()));
    Ok(Some(MemoryVolume {
        name,
        size_bytes,
        inodes,
        directories: directories.collect(),
        ..MemoryVolume::default()
    }))
}

/// A directory as the guest is to make it. In a pod with a user namespace, the host's kernel would map its ids where it
/// is mounted. Nothing maps those of the guest's own file system, so they are the mapped ones from the start.
fn in_guest(directory: PreparedDirectory, id_map: Option<&IdMap>) -> Directory {
    let PreparedDirectory { path, mode, uid, gid } = directory;
    let map = |id: u32, range: fn(&IdMap) -> IdRange| match id_map {
        Some(id_map) => range(id_map).on_host(id).unwrap_or(OVERFLOW_ID),
        None => id,
    };
    let (uid, gid) = (map(uid, |map| map.uids), map(gid, |map| map.gids));
    Directory { path, mode, uid, gid, ..Directory::default() }
}

#[cfg(test)]
mod tests {
    use std::{io, path::Path};

    use serde_json::json;

    use super::{
        super::{
            TranslatedSpec,
            tests::{ID_MAP, POD, add_mount, id, mappings, spec},
            translate,
        },
        *,
    };

    const EMPTY_DIRS: &str = "/var/lib/kubelet/pods/6f7c/volumes/kubernetes.io~empty-dir";
    const SUB_PATHS: &str = "/var/lib/kubelet/pods/6f7c/volume-subpaths";

    const GONE: &str = "/var/lib/kubelet/pods/6f7c/volume-subpaths/gone/web/0";

    /// A node on which `cache` is an emptyDir in memory, with the directory `a/b` in it as two containers' subPath. The
    /// directory of a third subPath has gone.
    fn memory_empty_dir(source: &Path, uid: &str) -> io::Result<Option<MemoryEmptyDir>> {
        assert_eq!(uid, "6f7c");
        if source == Path::new(GONE) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let directory =
            |path: &str, mode, uid, gid| PreparedDirectory { path: path.to_owned(), mode, uid, gid };
        let whole = MemoryEmptyDir {
            name: "cache".to_owned(),
            size_bytes: 2 << 20,
            inodes: 100,
            sub_path: String::new(),
            directories: vec![directory("", 0o2777, 0, 4242)],
        };
        if source == Path::new(EMPTY_DIRS).join("cache") {
            return Ok(Some(whole));
        }
        if !source.starts_with(Path::new(SUB_PATHS).join("cache")) {
            return Ok(None);
        }
        let mut part = MemoryEmptyDir { sub_path: "a/b".to_owned(), ..whole };
        part.directories.extend([directory("a", 0o2777, 0, 4242), directory("a/b", 0o1777, 7, 70000)]);
        Ok(Some(part))
    }

    /// Translates a spec that has no mounts except these, each with its source and options, at `/0`, `/1` and so on.
    fn with_mounts(mounts: &[(&str, Value)], pod: &Pod) -> Result<(Vec<Value>, TranslatedSpec), Error> {
        let mut spec = spec();
        let mounts = mounts.iter().enumerate().map(|(number, (source, options))| {
            json!({ "destination": format!("/{number}"), "type": "bind", "source": source, "options": options })
        });
        let count = mounts.len();
        spec["mounts"] = mounts.collect();
        if pod.id_map.is_some() {
            spec["mounts"].as_array_mut().unwrap().iter_mut().for_each(|mount| {
                mount["uidMappings"] = mappings();
                mount["gidMappings"] = mappings();
            });
        }
        let translated = translate(&serde_json::to_vec(&spec).unwrap(), &id(), pod, None)?;
        let spec: Value = serde_json::from_slice(&translated.spec).unwrap();
        Ok((spec["mounts"].as_array().unwrap()[..count].to_vec(), translated))
    }

    fn pod_in_memory() -> Pod {
        Pod { uid: "6f7c".to_owned(), memory_empty_dir, ..POD }
    }

    #[test]
    fn an_empty_dir_in_memory_is_the_guests_own_and_every_other_volume_is_in_the_share() {
        let writable = || json!(["rbind", "rprivate", "rw"]);
        let cache = format!("{EMPTY_DIRS}/cache");
        let in_share = |source: &str| {
            let (mounts, translated) = with_mounts(&[(source, writable())], &pod_in_memory()).unwrap();
            assert_eq!((translated.volumes.len(), &translated.memory_volumes[..]), (1, &[][..]), "{source}");
            let place = format!("/run/pericarp/share/.volumes/{}", translated.volumes[0].name);
            assert_eq!(mounts[0]["source"], place);
        };
        in_share(&format!("{EMPTY_DIRS}/disk"));
        in_share(&format!("{SUB_PATHS}/disk/web/0"));
        in_share("/var/lib/kubelet/pods/6f7c/volumes/kubernetes.io~secret/token");

        for (source, path, directories) in [
            (cache.clone(), "/run/pericarp/memory/cache", 1),
            (format!("{SUB_PATHS}/cache/web/0"), "/run/pericarp/memory/cache/a/b", 3),
            (format!("{SUB_PATHS}/cache/init/2"), "/run/pericarp/memory/cache/a/b", 3),
        ] {
            for options in [writable(), json!(["rbind", "rprivate", "ro"]), json!(["rbind", "rro", "rslave"])]
            {
                let (mounts, translated) =
                    with_mounts(&[(&source, options.clone())], &pod_in_memory()).unwrap();
                assert_eq!(translated.volumes, [], "{source}");
                let expected =
                    json!({ "destination": "/0", "type": "bind", "source": path, "options": options });
                assert_eq!(mounts[0], expected);
                let [volume] = &translated.memory_volumes[..] else {
                    panic!("{:?}", translated.memory_volumes)
                };
                assert_eq!((volume.name.as_str(), volume.size_bytes, volume.inodes), ("cache", 2 << 20, 100));
                assert_eq!(volume.directories.len(), directories);
            }
        }

        // A volume may be mounted twice, and one of another kind beside it: the order is that of the spec.
        let mounts =
            [(cache.as_str(), writable()), ("/var/lib/data", writable()), (&cache, json!(["bind", "ro"]))];
        let (_, translated) = with_mounts(&mounts, &pod_in_memory()).unwrap();
        assert_eq!((translated.volumes.len(), translated.memory_volumes.len()), (1, 2));
        assert_eq!(translated.memory_volumes[0], translated.memory_volumes[1]);
    }

    #[test]
    fn the_guest_makes_the_directories_that_kubelet_has_prepared_with_the_pods_ids() {
        let part = format!("{SUB_PATHS}/cache/web/0");
        let prepared = |pod: &Pod| {
            let (mounts, translated) = with_mounts(&[(&part, json!(["rbind"]))], pod).unwrap();
            assert_eq!((mounts[0].get("uidMappings"), translated.volumes.len()), (None, 0));
            let directories = translated.memory_volumes[0].directories.iter();
            directories.map(|made| (made.path.clone(), made.mode, made.uid, made.gid)).collect::<Vec<_>>()
        };
        let owned = |rows: [(&str, u32, u32, u32); 3]| {
            rows.map(|(path, mode, uid, gid)| (path.to_owned(), mode, uid, gid)).to_vec()
        };
        let plain = owned([("", 0o2777, 0, 4242), ("a", 0o2777, 0, 4242), ("a/b", 0o1777, 7, 70000)]);
        assert_eq!(prepared(&pod_in_memory()), plain);
        let root = 65536;
        let mapped = [
            ("", 0o2777, root, root + 4242),
            ("a", 0o2777, root, root + 4242),
            // The pod has no such group.
            ("a/b", 0o1777, root + 7, 65534),
        ];
        assert_eq!(prepared(&Pod { id_map: Some(ID_MAP), ..pod_in_memory() }), owned(mapped));
    }

    #[test]
    fn a_volume_in_memory_whose_ids_are_the_hosts_is_in_the_share_of_a_pod_with_others() {
        let source = format!("{EMPTY_DIRS}/cache");
        let mount = json!({ "destination": "/c", "type": "bind", "source": source, "options": ["bind"] });
        let mut spec = spec();
        add_mount(&mut spec, mount);
        let pod = Pod { id_map: Some(ID_MAP), ..pod_in_memory() };
        let translated = translate(&serde_json::to_vec(&spec).unwrap(), &id(), &pod, None).unwrap();
        assert_eq!((translated.volumes.len(), translated.memory_volumes.len()), (2, 0));
    }

    #[test]
    fn a_volume_in_memory_that_cannot_be_looked_at_is_an_error_with_its_place() {
        let error = with_mounts(&[(GONE, json!(["bind"]))], &pod_in_memory()).unwrap_err();
        assert!(matches!(&error, Error::MemoryVolume { destination, .. } if destination == "/0"), "{error}");
    }
}
