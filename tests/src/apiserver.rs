//! A real kube-apiserver with its etcd, from KUBEBUILDER_ASSETS.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{
    host::Host,
    process::{self, Process},
    wait::{self, patiently},
};

const TOKEN: &str = "testbed-token";
// The host is theirs alone, so any ports will do.
const SECURE_PORT: u16 = 6_443;
const ETCD: &str = "http://127.0.0.1:2379";
const ETCD_PEER: &str = "http://127.0.0.1:2380";

/// An API server on a host of its own, reachable from the nodes.
pub struct ApiServer {
    assets: PathBuf,
    host: Host,
    data: PathBuf,
    etcd: Process,
    server: Process,
}

impl ApiServer {
    /// Starts etcd and the API server on `host`, with their data in `folder`, and waits until they
    /// serve.
    pub fn start(assets: &Path, host: &Host, folder: &Path) -> Result<Self> {
        let data = folder.join("apiserver");
        fs::create_dir_all(&data).context("making a folder")?;
        keys(&data, host)?;
        let etcd = etcd(assets, &data, host)?;
        let server = server(assets, &data, host)?;
        let mut api = Self {
            assets: assets.to_path_buf(),
            host: host.clone(),
            data,
            etcd,
            server,
        };
        api.write_kubeconfig()?;
        api.wait()?;
        Ok(api)
    }

    fn wait(&mut self) -> Result<()> {
        patiently("the API server is ready", || {
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
            self.kubectl(&["get", "--raw", "/readyz"]).map(drop)
        })
    }

    fn write_kubeconfig(&self) -> Result<()> {
        let address = self.host.ip4;
        let text = format!(
            "apiVersion: v1\nkind: Config\n\
             clusters: [{{name: c, cluster: {{server: \"https://{address}:{SECURE_PORT}\", \
             certificate-authority: \"{}\"}}}}]\n\
             users: [{{name: u, user: {{token: \"{TOKEN}\"}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\ncurrent-context: c\n",
            self.data.join("server.crt").display()
        );
        fs::write(self.kubeconfig(), text).context("writing the kubeconfig")
    }

    /// Starts what makes pods of daemon sets and gives accounts their tokens: the controllers for that,
    /// and the scheduler. They live as long as what is returned.
    pub fn controllers(&self) -> Result<[Process; 2]> {
        let start = |name: &str, arguments: &[&str]| {
            let mut command = process::command(self.assets.join(name), &self.host.place)?;
            command
                .current_dir(&self.data)
                .arg("--kubeconfig")
                .arg(self.kubeconfig())
                .args(["--leader-elect=false", "--port=0", "--secure-port=0"])
                .args(arguments);
            Process::start_logging(command, &self.data.join(format!("{name}.log")))
        };
        let controllers = [
            "--controllers=daemonset,garbagecollector,serviceaccount,serviceaccount-token",
            "--service-account-private-key-file=sa.key",
            "--root-ca-file=server.crt",
        ];
        Ok([
            start("kube-controller-manager", &controllers)?,
            start("kube-scheduler", &[])?,
        ])
    }

    /// Where it is reached from the nodes.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.host.ip4, SECURE_PORT)
    }

    /// How to reach it from the nodes.
    pub fn kubeconfig(&self) -> PathBuf {
        self.data.join("kubeconfig")
    }

    /// `kubectl` as an administrator; what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = process::command(self.assets.join("kubectl"), &self.host.place)?;
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(arguments);
        process::run(command)
    }

    /// The same with objects in YAML or JSON for it to read.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let path = self.data.join("input");
        fs::write(&path, input).context("writing input")?;
        let path = path.to_str().context("a folder's name is no text")?;
        self.kubectl(&[arguments, &["-f", path]].concat())
    }

    /// Makes an object what it says.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let arguments = ["apply", "--server-side", "--force-conflicts"];
        self.kubectl_with(&arguments, &object.to_string()).map(drop)
    }

    /// Makes an object that is not there, also where [`Self::apply`] would merge what must not be
    /// merged, like a node's addresses of one type.
    pub fn create(&self, object: &Value) -> Result<()> {
        self.kubectl_with(&["create", "--validate=false"], &object.to_string())
            .map(drop)
    }

    /// Deletes an object.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.kubectl(&["delete", kind, name, "--wait=false"])
            .map(drop)
    }

    /// Sets the status of services, which [`Self::create`] leaves out.
    pub fn set_services_status(&self, statuses: &[(String, Value)]) -> Result<()> {
        let authority = self.data.join("server.crt").display().to_string();
        let token = format!("Authorization: Bearer {TOKEN}");
        let mut arguments = Vec::new();
        for (name, status) in statuses {
            let url = format!(
                "https://{}:{SECURE_PORT}/api/v1/namespaces/default/services/{name}/status",
                self.host.ip4
            );
            let change = json!({ "status": status }).to_string();
            let request = [
                &[
                    "--silent",
                    "--show-error",
                    "--fail",
                    "--output",
                    "/dev/null",
                ][..],
                &["--cacert", &authority, "--header", &token],
                &["--header", "Content-Type: application/merge-patch+json"],
                &["--request", "PATCH", "--data", &change, &url],
            ];
            if !arguments.is_empty() {
                arguments.push("--next".to_owned());
            }
            arguments.extend(request.concat().into_iter().map(str::to_owned));
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.host.run("curl", &arguments).map(drop)
    }

    /// Changes an object that is there.
    pub fn patch(&self, kind: &str, name: &str, change: &Value) -> Result<()> {
        let change = change.to_string();
        self.kubectl(&["patch", kind, name, "--type=merge", "-p", &change])
            .map(drop)
    }

    /// An object, as it is.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        let text = self.kubectl(&["get", kind, name, "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("{text:?} is no JSON"))
    }

    /// Waits until objects have a condition.
    pub fn wait_for(&self, condition: &str, kind: &str, names: &[&str]) -> Result<()> {
        let condition = format!("--for=condition={condition}");
        let timeout = format!("--timeout={}s", wait::long().as_secs());
        let arguments = ["wait", &condition, &timeout, kind];
        self.kubectl(&[&arguments, names].concat()).map(drop)
    }

    /// Kills the API server (not etcd) and starts it again.
    pub fn restart(&mut self) -> Result<()> {
        self.server.kill();
        self.server = server(&self.assets, &self.data, &self.host)?;
        self.wait()
    }
}

fn openssl(data: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("openssl");
    command.current_dir(data).args(arguments);
    process::run(command).map(drop)
}

/// A key and certificate for the server, a key for service accounts, a token for us.
fn keys(data: &Path, host: &Host) -> Result<()> {
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
            &format!(
                "subjectAltName=IP:127.0.0.1,IP:10.96.0.1,IP:{},DNS:localhost",
                host.ip4
            ),
        ],
    )?;
    openssl(data, &["genrsa", "-out", "sa.key", "2048"])?;
    fs::write(
        data.join("tokens.csv"),
        format!("{TOKEN},admin,admin,\"system:masters\"\n"),
    )
    .context("writing tokens")
}

fn etcd(assets: &Path, data: &Path, host: &Host) -> Result<Process> {
    let mut command = process::command(assets.join("etcd"), &host.place)?;
    command.arg("--data-dir").arg(data.join("etcd")).args([
        "--listen-client-urls",
        ETCD,
        "--advertise-client-urls",
        ETCD,
        "--listen-peer-urls",
        ETCD_PEER,
        "--initial-advertise-peer-urls",
        ETCD_PEER,
        "--initial-cluster",
        &format!("default={ETCD_PEER}"),
        "--unsafe-no-fsync",
        "--log-level",
        "warn",
    ]);
    Process::start_logging(command, &data.join("etcd.log"))
}

fn server(assets: &Path, data: &Path, host: &Host) -> Result<Process> {
    let program = assets.join("kube-apiserver");
    if !program.exists() {
        bail!("{} is not there", program.display());
    }
    let mut command = process::command(program, &host.place)?;
    command.current_dir(data).args([
        &format!("--etcd-servers={ETCD}"),
        &format!("--bind-address={}", host.ip4),
        &format!("--advertise-address={}", host.ip4),
        &format!("--secure-port={SECURE_PORT}"),
        "--tls-cert-file=server.crt",
        "--tls-private-key-file=server.key",
        "--token-auth-file=tokens.csv",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-account-signing-key-file=sa.key",
        "--service-account-key-file=sa.key",
        "--authorization-mode=RBAC",
        "--allow-privileged=true",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112",
        "--feature-gates=IPv6DualStack=true,EndpointSliceTerminatingCondition=true,\
         MixedProtocolLBService=true",
        "--endpoint-reconciler-type=lease",
        "--profiling=false",
    ]);
    Process::start_logging(command, &data.join("apiserver.log"))
}
