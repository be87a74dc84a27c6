//! Generates the Rust code of every protocol. Pure Rust: nobody needs `protoc`.

use std::{env, error::Error, fs, path::Path};

const ROOT: &str = "proto";
const CONTAINERD: &str = "github.com/containerd/containerd/api";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={ROOT}");
    let out = env::var("OUT_DIR")?;
    ttrpc(
        &Path::new(&out).join("messages"),
        &[
            "pericarp/agent.proto",
            "pericarp/host.proto",
            "pericarp/vmm.proto",
            &format!("{CONTAINERD}/services/streaming/v1/streaming.proto"),
        ],
        true,
    )?;
    // Apart from the others: its file has the same name as the service's.
    let transfer = format!("{CONTAINERD}/types/transfer/streaming.proto");
    ttrpc(&Path::new(&out).join("transfer"), &[&transfer], true)?;
    // The machine has no async runtime: its one service is generated a second time, blocking.
    ttrpc(&Path::new(&out).join("blocking"), &["pericarp/vmm.proto"], false)?;
    if env::var_os("CARGO_FEATURE_GRPC").is_some() {
        grpc()?;
    }
    Ok(())
}

fn ttrpc(out: &Path, inputs: &[&str], async_all: bool) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(out)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(out)
        .inputs(inputs.iter().map(|input| Path::new(ROOT).join(input)))
        .include(ROOT)
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .customize(ttrpc_codegen::Customize { async_all, ..Default::default() })
        .run()?;
    // One mod.rs for messages and services; the generators each know only their own half.
    let mut modules = String::new();
    for entry in fs::read_dir(out)? {
        let name =
            entry?.file_name().into_string().map_err(|name| format!("{}: not UTF-8", name.display()))?;
        match name.strip_suffix(".rs") {
            Some("mod") | None => {}
            Some(module) => modules.push_str(&format!("pub mod {module};\n")),
        }
    }
    fs::write(out.join("mod.rs"), modules)?;
    Ok(())
}

fn grpc() -> Result<(), Box<dyn Error>> {
    let clients = env::var_os("CARGO_FEATURE_CRI_CLIENT").is_some();
    let containerd =
        |names: &[&str]| protox::compile(names.iter().map(|name| format!("{CONTAINERD}/{name}")), [ROOT]);
    // One pass: their packages share types.
    tonic_prost_build::configure().compile_fds(containerd(&[
        "services/containers/v1/containers.proto",
        "services/events/v1/events.proto",
        "services/sandbox/v1/sandbox.proto",
        "services/snapshots/v1/snapshots.proto",
        "services/version/v1/version.proto",
        "types/introspection.proto",
    ])?)?;
    tonic_prost_build::configure()
        .build_client(clients)
        .build_server(false)
        // The controller keeps a pod's configuration on disk and shows it in verbose status.
        .type_attribute(".", "#[derive(serde::Serialize, serde::Deserialize)]")
        .message_attribute(".", "#[serde(default)]")
        .compile_fds(protox::compile(["cri/runtime.proto"], [ROOT])?)?;
    let descriptors = protox::Compiler::new([ROOT])?
        .include_source_info(false)
        .include_imports(true)
        .open_file("cri/runtime.proto")?
        .encode_file_descriptor_set();
    fs::write(Path::new(&env::var("OUT_DIR")?).join("cri.descriptors"), descriptors)?;
    Ok(())
}
