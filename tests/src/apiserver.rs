//! A real kube-apiserver with its etcd, from KUBEBUILDER_ASSETS.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    eventually,
    process::{self, Process},
};

const TOKEN: &str = "testbed-token";

/// An API server on loopback.
pub struct ApiServer {
    assets: PathBuf,
    data: PathBuf,
    ports: [u16; 3],
    etcd: Process,
    server: Process,
}

/// Ports that nobody listens on.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut listeners = Vec::with_capacity(N);
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("finding a free port")?;
        *port = listener.local_addr().context("finding a free port")?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

impl ApiServer {
    /// Starts etcd and the API server, with their data in `folder`, and waits until they serve.
    pub fn start(assets: &Path, folder: &Path) -> Result<Self> {
        let data = folder.join("apiserver");
        fs::create_dir_all(&data).context("making a folder")?;
        keys(&data)?;
        let ports = free_ports::<3>()?;
        let etcd = etcd(assets, &data, ports)?;
        let server = server(assets, &data, ports)?;
        let mut api = Self {
            assets: assets.to_path_buf(),
            data,
            ports,
            etcd,
            server,
        };
        api.write_kubeconfig()?;
        api.wait()?;
        Ok(api)
    }

    fn wait(&mut self) -> Result<()> {
        eventually("the API server is ready", || {
            anyhow::ensure!(
                self.etcd.is_running(),
                "etcd ended; see {}",
                self.data.display()
            );
            anyhow::ensure!(
                self.server.is_running(),
                "kube-apiserver ended: {}",
                fs::read_to_string(self.data.join("apiserver.log")).unwrap_or_default()
            );
            self.kubectl(&["get", "--raw", "/readyz"], None).map(drop)
        })
    }

    fn write_kubeconfig(&self) -> Result<()> {
        let [_, _, port] = self.ports;
        let text = format!(
            "apiVersion: v1\nkind: Config\n\
             clusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:{port}\", \
             certificate-authority: \"{}\"}}}}]\n\
             users: [{{name: u, user: {{token: \"{TOKEN}\"}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\ncurrent-context: c\n",
            self.data.join("server.crt").display()
        );
        fs::write(self.kubeconfig(), text).context("writing the kubeconfig")
    }

    /// How to reach it from the namespace that it was started in.
    pub fn kubeconfig(&self) -> PathBuf {
        self.data.join("kubeconfig")
    }

    fn kubectl(&self, arguments: &[&str], input: Option<&Value>) -> Result<String> {
        let mut command = Command::new(self.assets.join("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(arguments);
        if let Some(input) = input {
            let path = self.data.join("input.json");
            fs::write(&path, input.to_string()).context("writing input")?;
            command.arg("-f").arg(path);
        }
        process::run(command)
    }

    /// Makes an object what it says.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let arguments = ["apply", "--server-side", "--force-conflicts"];
        self.kubectl(&arguments, Some(object)).map(drop)
    }

    /// Deletes an object.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.kubectl(&["delete", kind, name, "--wait=false"], None)
            .map(drop)
    }

    /// Kills the API server (not etcd) and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.server.kill();
        self.server = server(&self.assets, &self.data, self.ports)?;
        self.wait()
    }
}

fn openssl(data: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("openssl");
    command.current_dir(data).args(arguments);
    process::run(command).map(drop)
}

/// A key and certificate for the server, a key for service accounts, a token for us.
fn keys(data: &Path) -> Result<()> {
    openssl(
        data,
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            "server.key",
            "-out",
            "server.crt",
            "-days",
            "2",
            "-subj",
            "/CN=testbed",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            "subjectAltName=IP:127.0.0.1,IP:10.96.0.1,DNS:localhost",
        ],
    )?;
    openssl(data, &["genrsa", "-out", "sa.key", "2048"])?;
    fs::write(
        data.join("tokens.csv"),
        format!("{TOKEN},admin,admin,\"system:masters\"\n"),
    )
    .context("writing tokens")
}

fn etcd(assets: &Path, data: &Path, [client, peer, _]: [u16; 3]) -> Result<Process> {
    let mut command = process::command(assets.join("etcd"), &process::here())?;
    let (client, peer) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    command.arg("--data-dir").arg(data.join("etcd")).args([
        "--listen-client-urls",
        &client,
        "--advertise-client-urls",
        &client,
        "--listen-peer-urls",
        &peer,
        "--initial-advertise-peer-urls",
        &peer,
        "--initial-cluster",
        &format!("default={peer}"),
        "--unsafe-no-fsync",
        "--log-level",
        "warn",
    ]);
    Process::start_logging(command, &data.join("etcd.log"))
}

fn server(assets: &Path, data: &Path, [etcd, _, port]: [u16; 3]) -> Result<Process> {
    let program = assets.join("kube-apiserver");
    if !program.exists() {
        bail!("{} is not there", program.display());
    }
    let mut command = process::command(program, &process::here())?;
    command.current_dir(data).args([
        &format!("--etcd-servers=http://127.0.0.1:{etcd}"),
        "--bind-address=127.0.0.1",
        &format!("--secure-port={port}"),
        "--tls-cert-file=server.crt",
        "--tls-private-key-file=server.key",
        "--token-auth-file=tokens.csv",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-account-signing-key-file=sa.key",
        "--service-account-key-file=sa.key",
        "--authorization-mode=AlwaysAllow",
        "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
        "--feature-gates=IPv6DualStack=true,EndpointSliceTerminatingCondition=true",
        "--endpoint-reconciler-type=lease",
        "--profiling=false",
    ]);
    Process::start_logging(command, &data.join("apiserver.log"))
}
