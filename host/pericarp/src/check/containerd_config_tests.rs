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
    fn new(files: &[(&str, &str)]) -> Files {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Files(directory)
    }

    fn load(&self) -> Result<Containerd, LoadError> {
        load(&self.0.path().join("config.toml"))
    }

    fn judged(&self) -> Result<Vec<String>, Problem> {
        judge(&self.load().unwrap(), Path::new(SOCKET))
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

#[test]
fn the_configuration_of_the_operators_guide_is_good() {
    let guide = include_str!("../../../../docs/operators.md");
    let (_, toml) = guide.split_once("```toml\n").unwrap();
    let (toml, _) = toml.split_once("```").unwrap();
    assert_eq!(judged(&format!("version = 3\n{toml}")).unwrap(), ["pericarp"]);
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
fn version_2s_names_count_in_version_2_only() {
    let old = with("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri");
    assert!(matches!(judged(&old), Err(Problem::NoRuntime { .. })));
    assert_eq!(judged(&old.replace("version = 3", "version = 2")).unwrap(), ["pericarp"]);
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
    let missing = Files::new(&[("config.toml", "imports = ['more.toml']")]).load().unwrap_err();
    assert!(matches!(&missing, LoadError::Read { path, .. } if path.ends_with("more.toml")), "{missing:?}");
    let damaged = Files::new(&[("config.toml", "imports = ['more.toml']"), ("more.toml", "= 3")]);
    let damaged = damaged.load().unwrap_err();
    assert!(matches!(&damaged, LoadError::Parse { path, .. } if path.ends_with("more.toml")), "{damaged:?}");
}

#[test]
fn a_file_that_is_missing_fails_the_check() {
    let finding = check(Path::new("/nonexistent/config.toml"), Path::new(SOCKET));
    assert_eq!(finding.status, Status::Failed);
    assert!(finding.found.starts_with("/nonexistent/config.toml cannot be read"), "{finding:?}");
}
