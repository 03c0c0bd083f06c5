//! A TPM emulator (`swtpm`): served to a QEMU, or spoken to by the test itself, in the TPM's own words (TPM 2.0
//! Library, Part 3: Commands).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};

use crate::support::Host;
use crate::support::process::{LONG, SHORT, wait_for};

/// The owner, whose password is empty.
const OWNER: u32 = 0x4000_0001;
/// Something that a guest keeps in its TPM.
const INDEX: u32 = 0x0150_0000;
/// The owner may write and read it; no lockout.
const ATTRIBUTES: u32 = 1 << 1 | 1 << 17 | 1 << 25;
const SHA256: u16 = 0x000b;
const DEFINE: u32 = 0x12a;
const WRITE: u32 = 0x137;
const READ: u32 = 0x14e;

/// A running emulator with its state in a folder; killed when dropped.
pub(super) struct Tpm {
    child: Child,
    folder: PathBuf,
}

impl Tpm {
    /// Ready for a QEMU.
    pub(super) fn serve(host: &Host, folder: &Path) -> Result<Self> {
        Self::start(host, folder, &[])
    }

    fn start(host: &Host, folder: &Path, more: &[String]) -> Result<Self> {
        let path = |name: &str| format!("type=unixio,path={}", folder.join(name).display());
        let mut command = host.command("swtpm");
        command.args(["socket", "--tpm2", "--terminate", "--tpmstate", &format!("dir={}", folder.display())]);
        command.args(["--ctrl", &path("control")]).args(more);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut tpm = Self { child: child.context("swtpm (package swtpm)")?, folder: folder.to_owned() };
        wait_for("the TPM", SHORT, || {
            ensure!(tpm.child.try_wait()?.is_none(), "swtpm has ended");
            Ok(tpm.control().exists().then_some(()))
        })?;
        Ok(tpm)
    }

    pub(super) fn control(&self) -> PathBuf {
        self.folder.join("control")
    }

    /// Makes a TPM whose owner has written this.
    pub(super) fn write(host: &Host, folder: &Path, bytes: &[u8; 16]) -> Result<()> {
        let mut spoken = Spoken::start(host, folder)?;
        let mut public =
            [&INDEX.to_be_bytes()[..], &SHA256.to_be_bytes(), &ATTRIBUTES.to_be_bytes()].concat();
        public.extend([0, 0, 0, 16]);
        spoken.command(DEFINE, &[OWNER], &[&[0, 0, 0, public.len() as u8], &public[..]].concat())?;
        spoken.command(WRITE, &[OWNER, INDEX], &[&[0, 16], &bytes[..], &[0, 0]].concat())?;
        spoken.end()
    }

    /// What its owner has written.
    pub(super) fn read(host: &Host, folder: &Path) -> Result<Vec<u8>> {
        let mut spoken = Spoken::start(host, folder)?;
        let answer = spoken.command(READ, &[OWNER, INDEX], &[0, 16, 0, 0])?;
        // The size of all parameters, then that of the one.
        let bytes = answer.get(6..22).context("a short answer")?.to_vec();
        spoken.end().map(|()| bytes)
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(self.control());
    }
}

/// One that the test speaks to.
struct Spoken {
    tpm: Tpm,
    stream: UnixStream,
}

impl Spoken {
    fn start(host: &Host, folder: &Path) -> Result<Self> {
        let socket = folder.join("commands");
        let server = format!("type=unixio,path={}", socket.display());
        let more = ["--server", &server, "--flags", "startup-clear"].map(str::to_owned);
        let tpm = Tpm::start(host, folder, &more)?;
        let stream = wait_for("the TPM's socket", SHORT, || Ok(UnixStream::connect(&socket).ok()))?;
        stream.set_read_timeout(Some(LONG))?;
        Ok(Self { tpm, stream })
    }

    /// Executes a command with the owner's empty password; what follows the head of its answer.
    fn command(&mut self, code: u32, handles: &[u32], parameters: &[u8]) -> Result<Vec<u8>> {
        let mut body: Vec<u8> = handles.iter().flat_map(|handle| handle.to_be_bytes()).collect();
        body.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
        body.extend_from_slice(parameters);
        let size = u32::try_from(body.len() + 10)?;
        self.stream.write_all(&[&[0x80, 2][..], &size.to_be_bytes(), &code.to_be_bytes(), &body].concat())?;
        let mut head = [0; 10];
        self.stream.read_exact(&mut head)?;
        let [_, _, size @ .., a, b, c, d] = head;
        let mut rest = vec![0; (u32::from_be_bytes(size) as usize).saturating_sub(head.len())];
        self.stream.read_exact(&mut rest)?;
        let code = u32::from_be_bytes([a, b, c, d]);
        ensure!(code == 0, "the TPM answers {code:#x}");
        Ok(rest)
    }

    /// Closes the connection, with which it ends.
    fn end(self) -> Result<()> {
        let Self { mut tpm, stream } = self;
        drop(stream);
        wait_for("the end of the TPM", SHORT, || Ok(tpm.child.try_wait()?)).map(drop)
    }
}
