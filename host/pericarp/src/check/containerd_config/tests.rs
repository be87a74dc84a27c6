use std::fs;

use super::{super::Status, *};

const SOCKET: &str = "/run/pericarp/controller.sock";

const GOOD: &str = r"
version = 3

[proxy_plugins.pericarp]
  type = 'sandbox'
  address = '/run/pericarp/controller.sock'

[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'runc'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pericarp]
  runtime_type = 'io.containerd.pericarp.v1'
  sandboxer = 'pericarp'
  io_type = 'streaming'
";

/// A directory with containerd's configuration; `config.toml` is the main file.
struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Self(directory)
    }

    /// The main file.
    fn main(&self) -> PathBuf {
        self.0.path().join("config.toml")
    }

    fn load(&self, release: Release) -> Result<Containerd, LoadError> {
        load(&self.main(), release, None)
    }

    /// The runtimes that lead to the controller, or the problem.
    fn judged_by(&self, release: Release) -> Result<Vec<String>, Problem> {
        let config = self.load(release).unwrap();
        judge(&config, Path::new(SOCKET)).map(|names| names.into_iter().map(str::to_owned).collect())
    }

    fn judged(&self) -> Result<Vec<String>, Problem> {
        self.judged_by(Release::NEWEST_KNOWN)
    }

    fn checked(&self, release: Option<Release>) -> Finding {
        check(&self.main(), Path::new(SOCKET), release)
    }
}

fn judged(text: &str) -> Result<Vec<String>, Problem> {
    Files::new(&[("config.toml", text)]).judged()
}

/// `GOOD` with one text put for another, which must be there.
fn with(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replace(from, to)
}

const RELEASES: [Release; 4] = [Release(2, 1), Release(2, 2), Release(2, 3), Release(2, 4)];

/// The main file as a release of containerd writes it (`containerd config default`).
fn sample(release: Release) -> &'static str {
    match release {
        Release(2, 1) => include_str!("samples/2.1.toml"),
        Release(2, 2) => include_str!("samples/2.2.toml"),
        Release(2, 3) => include_str!("samples/2.3.toml"),
        Release(2, 4) => include_str!("samples/2.4.toml"),
        _ => panic!("there is no sample for {release}"),
    }
}

/// What the operators' guide has under the heading of a release: the first example in TOML.
fn guide(release: Release) -> &'static str {
    let guide = include_str!("../../../../../docs/operators.md");
    let heading = format!("### containerd {}.{}", release.0, release.1);
    let (_, section) =
        guide.split_once(&heading).unwrap_or_else(|| panic!("there is no heading {heading:?}"));
    let (_, toml) = section.split_once("```toml\n").unwrap();
    toml.split_once("```").unwrap().0
}

#[test]
fn the_guides_example_for_each_release_is_good_beside_what_containerd_writes_itself() {
    for release in RELEASES {
        let files = Files::new(&[("config.toml", ""), ("conf.d/pericarp.toml", guide(release))]);
        let directory = files.0.path().display().to_string();
        let main = sample(release).replace("/etc/containerd/", &format!("{directory}/"));
        fs::write(files.main(), &main).unwrap();
        if release == Release(2, 1) {
            // It writes no imports.
            let finding = files.checked(Some(release));
            assert!(finding.found.ends_with("conf.d/*.toml, which no file imports"), "{finding:?}");
            let to_do = format!("add imports = ['{directory}/conf.d/*.toml']");
            assert!(finding.to_do.unwrap().starts_with(&to_do));
            let imported = main.replace("imports = []", &format!("imports = ['{directory}/conf.d/*.toml']"));
            fs::write(files.main(), imported).unwrap();
        } else {
            assert!(main.contains("imports = ['"), "{release}");
        }
        let finding = files.checked(Some(release));
        assert_eq!(finding.status, Status::Ok, "{release}: {finding:?}");
        assert!(finding.found.ends_with("runtime pericarp leads to the controller"), "{finding:?}");
    }
}

#[test]
fn what_containerd_writes_itself_has_no_runtime_of_ours() {
    for release in RELEASES {
        let files = Files::new(&[("config.toml", sample(release))]);
        let problem = files.judged_by(release).unwrap_err();
        assert_eq!(problem, Problem::NoPlugin { socket: SOCKET.into(), others: String::new() }, "{release}");
    }
}

#[test]
fn the_runtime_that_leads_to_the_controller_is_named() {
    assert_eq!(judged(GOOD).unwrap(), ["pericarp"]);
}

#[test]
fn a_plugin_with_another_address_is_told() {
    let problem = judged(&with(SOCKET, "/run/other.sock")).unwrap_err();
    assert!(matches!(&problem, Problem::NoPlugin { .. }), "{problem:?}");
    assert!(problem.to_string().contains("\"pericarp\" has /run/other.sock"), "{problem}");
    assert!(problem.to_do().contains(SOCKET));
}

#[test]
fn a_plugin_of_another_type_is_told() {
    let problem = judged(&with("type = 'sandbox'", "type = 'snapshot'")).unwrap_err();
    assert_eq!(problem, Problem::PluginType { plugin: "pericarp".into(), found: "snapshot".into() });
}

#[test]
fn a_runtime_without_the_sandboxer_does_not_count() {
    let problem = judged(&with("sandboxer = 'pericarp'", "")).unwrap_err();
    assert_eq!(problem, Problem::NoRuntime { plugin: "pericarp".into() });
    let other = judged(&with("sandboxer = 'pericarp'", "sandboxer = 'podsandbox'")).unwrap_err();
    assert_eq!(other, problem);
}

#[test]
fn a_runtime_of_another_type_is_told() {
    let problem = judged(&with("io.containerd.pericarp.v1", "io.containerd.runc.v2")).unwrap_err();
    assert!(matches!(problem, Problem::RuntimeType { .. }), "{problem:?}");
}

#[test]
fn a_runtime_of_runcs_type_is_good_by_the_path_to_our_program() {
    let by_path = |program: &str| {
        judged(&with(
            "io.containerd.pericarp.v1'",
            &format!("io.containerd.runc.v2'\n  runtime_path = '/opt/{program}'"),
        ))
    };
    assert_eq!(by_path("containerd-shim-pericarp-v1").unwrap(), ["pericarp"]);
    assert!(matches!(by_path("crun"), Err(Problem::RuntimeType { .. })));
}

#[test]
fn a_runtime_without_streaming_io_is_told() {
    let problem = judged(&with("io_type = 'streaming'", "io_type = 'fifo'")).unwrap_err();
    assert_eq!(problem, Problem::IoType { runtime: "pericarp".into(), found: "fifo".into() });
    let missing = judged(&with("io_type = 'streaming'", "")).unwrap_err();
    assert!(missing.to_string().contains("no io_type"), "{missing}");
}

#[test]
fn a_runtime_with_options_is_told() {
    let problem = judged(&with("io_type = 'streaming'", "io_type = 'streaming'\n options.Root = '/x'"));
    assert_eq!(problem.unwrap_err(), Problem::Options { runtime: "pericarp".into() });
}

#[test]
fn a_disabled_cri_plugin_is_told() {
    let problem = judged(&with("version = 3", "version = 3\ndisabled_plugins = ['cri']")).unwrap_err();
    assert_eq!(problem, Problem::Disabled { name: "cri".into() });
}

#[test]
fn a_runtime_with_the_path_of_another_program_is_told() {
    let with_path = |path: &str| judged(&with("io_type", &format!("runtime_path = '{path}'\n  io_type")));
    assert_eq!(with_path("/opt/containerd-shim-pericarp-v1").unwrap(), ["pericarp"]);
    assert_eq!(with_path("").unwrap(), ["pericarp"]);
    for path in ["/usr/bin/containerd-shim-runc-v2", "containerd-shim-pericarp-v1"] {
        let expected = Problem::RuntimePath { runtime: "pericarp".into(), found: path.into() };
        assert_eq!(with_path(path).unwrap_err(), expected);
    }
}

/// `GOOD` in the names of configuration version 2.
fn in_names_of_version_2() -> String {
    with(CRI_RUNTIME, CRI)
}

#[test]
fn older_names_count_where_containerd_takes_them_over() {
    let older = in_names_of_version_2();
    let version = |number: u32| older.replace("version = 3", &format!("version = {number}"));
    let unversioned = older.replace("version = 3", "");
    let version_1 = unversioned.replace(CRI, CRI_VERSION_1);
    // Up to 2.2 a file without a version is merged as one of version 3, and its names then mean nothing. From 2.3 on
    // names of version 2 are taken over from every file before version 4.
    for (text, up_to_2_2, from_2_3) in [
        (&version(2), true, true),
        (&version(3), false, true),
        (&version(4), false, false),
        (&unversioned, false, true),
        (&version_1, false, true),
    ] {
        for release in RELEASES {
            let files = Files::new(&[("config.toml", text)]);
            let expected = if release < Release(2, 3) { up_to_2_2 } else { from_2_3 };
            let found = files.load(release).is_ok_and(|config| judge(&config, Path::new(SOCKET)).is_ok());
            assert_eq!(found, expected, "{release}: {text}");
        }
    }
}

#[test]
fn the_mode_of_a_sandbox_was_the_sandboxers_name_in_version_2() {
    let text =
        in_names_of_version_2().replace("version = 3", "version = 2").replace("sandboxer", "sandbox_mode");
    for release in RELEASES {
        assert_eq!(Files::new(&[("config.toml", &text)]).judged_by(release).unwrap(), ["pericarp"]);
    }
}

#[test]
fn a_version_that_containerd_does_not_read_is_told_with_the_release() {
    let version_4 = Files::new(&[("config.toml", &with("version = 3", "version = 4"))]);
    for release in [Release(2, 1), Release(2, 2)] {
        let finding = version_4.checked(Some(release));
        let expected = format!("is of version 4, and {release} reads versions up to 3");
        assert!(finding.status == Status::Failed && finding.found.ends_with(&expected), "{finding:?}");
        assert!(finding.to_do.unwrap().starts_with("write the file for version 3"));
    }
    for release in [Release(2, 3), Release(2, 4), Release(2, 9), Release(3, 0)] {
        assert_eq!(version_4.judged_by(release).unwrap(), ["pericarp"], "{release}");
    }
    let version_5 = Files::new(&[("config.toml", &with("version = 3", "version = 5"))]);
    assert!(matches!(version_5.load(Release(2, 4)), Err(LoadError::TooNew { version: 5, newest: 4, .. })));
}

#[test]
fn an_imported_file_may_not_be_newer_than_the_main_file_in_2_3() {
    let drop_in = with("version = 3", "version = 4");
    for (main, drop_in, refused) in [
        ("version = 3", drop_in.as_str(), true),
        ("version = 4", drop_in.as_str(), false),
        ("version = 4", GOOD, false),
        ("", drop_in.as_str(), false),
    ] {
        let main = format!("{main}\nimports = ['more.toml']");
        let files = Files::new(&[("config.toml", &main), ("more.toml", drop_in)]);
        let finding = files.checked(Some(Release(2, 3)));
        assert_eq!(finding.status == Status::Failed, refused, "{main}: {finding:?}");
        if refused {
            assert!(finding.found.contains("more.toml is of version 4"), "{finding:?}");
            assert!(finding.to_do.unwrap().starts_with("set version = 3 in the imported file"));
        }
        assert_eq!(files.judged_by(Release(2, 4)).unwrap(), ["pericarp"]);
    }
}

#[test]
fn an_imported_files_version_decides_for_all_files_up_to_2_2() {
    let main = in_names_of_version_2().replace("version = 3", "version = 2\nimports = ['more.toml']");
    for (drop_in, up_to_2_2) in [("version = 2", true), ("version = 3", false), ("", true)] {
        let files = Files::new(&[("config.toml", &main), ("more.toml", drop_in)]);
        for release in [Release(2, 1), Release(2, 2)] {
            assert_eq!(files.judged_by(release).is_ok(), up_to_2_2, "{release}: {drop_in}");
        }
        assert_eq!(files.judged_by(Release(2, 4)).unwrap(), ["pericarp"], "{drop_in}");
    }
}

#[test]
fn containerd_2_4_is_to_leave_out_the_image_of_the_pause_container() {
    let pulling = Files::new(&[("config.toml", GOOD)]);
    let text = with("io_type", "disable_pause_image_pull = true\n  io_type");
    let not_pulling = Files::new(&[("config.toml", &text)]);
    for release in [Some(Release(2, 1)), Some(Release(2, 3)), None] {
        assert_eq!(pulling.checked(release).status, Status::Ok, "{release:?}");
        assert_eq!(not_pulling.checked(release).status, Status::Ok, "{release:?}");
    }
    let finding = pulling.checked(Some(Release(2, 4)));
    assert_eq!(finding.status, Status::Warning, "{finding:?}");
    assert!(finding.to_do.unwrap().contains("disable_pause_image_pull = true"));
    assert_eq!(not_pulling.checked(Some(Release(2, 4))).status, Status::Ok);
}

#[test]
fn files_in_conf_d_are_read_only_if_they_are_imported() {
    let files = Files::new(&[("config.toml", "version = 3"), ("conf.d/pericarp.toml", GOOD)]);
    for release in RELEASES {
        let finding = files.checked(Some(release));
        assert_eq!(finding.status, Status::Failed);
        assert!(finding.found.ends_with("conf.d/*.toml, which no file imports"), "{release}: {finding:?}");
        assert!(finding.to_do.unwrap().contains("imports = ['"));
    }
    // What would not help is not advised.
    let other = Files::new(&[("config.toml", "version = 3"), ("conf.d/other.toml", "root = '/x'")]);
    assert!(other.checked(None).found.contains("no proxy plugin"), "{:?}", other.checked(None));
}

#[test]
fn lists_in_a_plugins_configuration_are_replaced_and_disabled_plugins_add_up() {
    let files = Files::new(&[
        (
            "config.toml",
            &with("version = 3", "version = 3\nimports = ['more.toml']\ndisabled_plugins = ['a.b']"),
        ),
        ("more.toml", "disabled_plugins = ['io.containerd.grpc.v1.cri']"),
    ]);
    for release in RELEASES {
        let expected = Problem::Disabled { name: CRI.into() };
        assert_eq!(files.judged_by(release).unwrap_err(), expected, "{release}");
    }
    // A list below a runtime does not make its table another one.
    let runtime = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pericarp]";
    let files = Files::new(&[
        ("config.toml", &with("version = 3", "version = 3\nimports = ['a.toml', 'b.toml']")),
        ("a.toml", &format!("{runtime}\npod_annotations = ['a']")),
        ("b.toml", &format!("{runtime}\npod_annotations = ['b']")),
    ]);
    assert_eq!(files.judged().unwrap(), ["pericarp"]);
}

#[test]
fn imported_files_are_merged_over_the_main_file() {
    let files = Files::new(&[
        ("config.toml", "version = 3\nimports = ['conf.d/*.toml', 'more.toml']"),
        ("conf.d/10-pericarp.toml", &with("'streaming'", "'fifo'")),
        (
            "more.toml",
            "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pericarp]\nio_type = 'streaming'",
        ),
    ]);
    assert_eq!(files.judged().unwrap(), ["pericarp"]);
}

#[test]
fn a_later_plugin_replaces_an_earlier_one_as_a_whole() {
    let files = Files::new(&[
        ("config.toml", &with("version = 3", "version = 3\nimports = ['more.toml']")),
        ("more.toml", "[proxy_plugins.pericarp]\naddress = '/run/pericarp/controller.sock'"),
    ]);
    assert_eq!(
        files.judged().unwrap_err(),
        Problem::PluginType { plugin: "pericarp".into(), found: String::new() }
    );
}

#[test]
fn files_that_import_each_other_are_read_once() {
    let files = Files::new(&[
        ("config.toml", &with("version = 3", "version = 3\nimports = ['more.toml']")),
        ("more.toml", "imports = ['config.toml', 'none*.toml']"),
    ]);
    assert_eq!(files.judged().unwrap(), ["pericarp"]);
}

#[test]
fn an_imported_file_that_is_missing_or_damaged_is_named() {
    let files = Files::new(&[("config.toml", "imports = ['more.toml']")]);
    let missing = files.load(Release::NEWEST_KNOWN).unwrap_err();
    assert!(matches!(&missing, LoadError::Read { path, .. } if path.ends_with("more.toml")), "{missing:?}");
    let damaged = Files::new(&[("config.toml", "imports = ['more.toml']"), ("more.toml", "= 3")]);
    let damaged = damaged.load(Release::NEWEST_KNOWN).unwrap_err();
    assert!(matches!(&damaged, LoadError::Parse { path, .. } if path.ends_with("more.toml")), "{damaged:?}");
}

#[test]
fn a_file_that_is_missing_fails_the_check() {
    let finding = check(Path::new("/nonexistent/config.toml"), Path::new(SOCKET), None);
    assert_eq!(finding.status, Status::Failed);
    assert!(finding.to_do.as_ref().unwrap().contains("containerd config default"), "{finding:?}");
    assert!(finding.found.starts_with("/nonexistent/config.toml cannot be read"), "{finding:?}");
}
