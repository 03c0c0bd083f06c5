//! What stunnel, nginx, haproxy and socat are told. Copy buffers of 64 KiB where they can be
//! chosen, as the TLS copy has; no session tickets and no logging of connections.

use std::process::Command;

use anyhow::bail;

use super::{End, FAR, How, Which, text};

const CIPHER: &str = "TLS_AES_128_GCM_SHA256";
const BUFFER_BYTES: usize = 64 * 1024;

pub(super) fn command(which: Which, how: &How, end: &End) -> anyhow::Result<Command> {
    match which {
        Which::Stunnel => stunnel(how, end),
        Which::Nginx => nginx(how, end),
        Which::Haproxy => haproxy(how, end),
        Which::Socat => Ok(socat(how, end)),
        Which::Ssh => bail!("ssh is started elsewhere"),
    }
}

fn stunnel(how: &How, end: &End) -> anyhow::Result<Command> {
    let service = match end {
        End::Near { local, peer } => {
            format!("client = yes\naccept = {}\nconnect = {peer}\ncheckHost = {FAR}\n", text(local))
        }
        End::Far { at, remote } => {
            format!("accept = {at}\nconnect = {}\nrequireCert = yes\n", text(remote))
        }
    };
    let config = format!(
        "foreground = yes\ndebug = err\npid =\n\
         socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n\
         [relay]\n{service}\
         cert = {}\nkey = {}\nCAfile = {}\nverifyChain = yes\n\
         sslVersion = TLSv1.3\nciphersuites = {CIPHER}\nsessionResume = no\n",
        how.file("cert.pem"),
        how.file("key.pem"),
        how.file("ca-cert.pem"),
    );
    let mut command = how.program("stunnel4");
    command.arg(how.write("stunnel.conf", &config)?);
    Ok(command)
}

fn nginx(how: &How, end: &End) -> anyhow::Result<Command> {
    let (cert, key, ca) = (how.file("cert.pem"), how.file("key.pem"), how.file("ca-cert.pem"));
    let server = match end {
        End::Near { local, peer } => format!(
            "listen unix:{}; proxy_pass {peer}; proxy_ssl on;\n\
             proxy_ssl_certificate {cert}; proxy_ssl_certificate_key {key};\n\
             proxy_ssl_trusted_certificate {ca}; proxy_ssl_verify on; proxy_ssl_name {FAR};\n\
             proxy_ssl_protocols TLSv1.3; proxy_ssl_conf_command Ciphersuites {CIPHER};\n\
             proxy_ssl_session_reuse off;",
            text(local)
        ),
        End::Far { at, remote } => format!(
            "listen {at} ssl; proxy_pass unix:{};\n\
             ssl_certificate {cert}; ssl_certificate_key {key};\n\
             ssl_client_certificate {ca}; ssl_verify_client on;\n\
             ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites {CIPHER}; ssl_session_tickets off;",
            text(remote)
        ),
    };
    let module = how.programs.join("../usr/lib/nginx/modules/ngx_stream_module.so");
    let module =
        if module.exists() { text(&module) } else { "/usr/lib/nginx/modules/ngx_stream_module.so".into() };
    // Nobody but we may enter our folder, so the worker has to be who we are.
    let user = nix::unistd::User::from_uid(nix::unistd::getuid())?.map_or_else(|| "root".into(), |u| u.name);
    let config = format!(
        "load_module {module};\nuser {user};\ndaemon off;\nworker_processes 1;\npid {};\n\
         error_log {} warn;\nevents {{ worker_connections 8192; }}\n\
         stream {{ server {{ tcp_nodelay on; proxy_buffer_size {BUFFER_BYTES};\n{server} }} }}\n",
        how.file("pid"),
        how.file("log"),
    );
    let config = how.write("nginx.conf", &config)?;
    let mut command = how.program("nginx");
    command.args(["-e", &how.file("log"), "-p", &text(&how.tls), "-c", &config]);
    Ok(command)
}

fn haproxy(how: &How, end: &End) -> anyhow::Result<Command> {
    let pem = |name: &str| std::fs::read_to_string(how.tls.join(name));
    let both = how.write("both.pem", &(pem("cert.pem")? + &pem("key.pem")?))?;
    let tls = format!(
        "ssl crt {both} ca-file {} verify required ssl-min-ver TLSv1.3 ciphersuites {CIPHER}",
        how.file("ca-cert.pem")
    );
    let relay = match end {
        End::Near { local, peer } => {
            format!("bind unix@{}\n  server far {peer} {tls} verifyhost {FAR} no-ssl-reuse", text(local))
        }
        End::Far { at, remote } => {
            format!("bind {at} {tls} no-tls-tickets\n  server sink unix@{}", text(remote))
        }
    };
    let config = format!(
        "global\n  maxconn 8000\n  nbthread 1\n  tune.bufsize {BUFFER_BYTES}\n\
         defaults\n  mode tcp\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n\
         listen relay\n  {relay}\n"
    );
    let config = how.write("haproxy.conf", &config)?;
    let mut command = how.program("haproxy");
    command.args(["-db", "-q", "-f", &config]);
    Ok(command)
}

/// Its version 1.7 can't choose among the suites of TLS 1.3: it gets AES-256-GCM.
fn socat(how: &How, end: &End) -> Command {
    let tls = format!(
        "nodelay,cert={},key={},cafile={},verify=1,openssl-min-proto-version=TLS1.3",
        how.file("cert.pem"),
        how.file("key.pem"),
        how.file("ca-cert.pem")
    );
    let (from, to) = match end {
        End::Near { local, peer } => {
            (format!("UNIX-LISTEN:{},fork", text(local)), format!("OPENSSL:{peer},{tls},commonname={FAR}"))
        }
        End::Far { at, remote } => (
            format!("OPENSSL-LISTEN:{},bind={},reuseaddr,fork,{tls}", at.port(), at.ip()),
            format!("UNIX-CONNECT:{}", text(remote)),
        ),
    };
    let mut command = how.program("socat");
    command.args(["-b", &BUFFER_BYTES.to_string(), &from, &to]);
    command
}
