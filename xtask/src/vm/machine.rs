//! One boot of the virtual machine: a command with its files, what it prints, and its exit status.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::Image;

const MEBIBYTE: u64 = 1 << 20;

/// What a script needs of the machine.
#[derive(Debug)]
pub(crate) struct Job {
    timeout: Duration,
    files: Vec<(PathBuf, PathBuf)>,
}

impl Job {
    /// A job that may take `timeout` from the start of the boot.
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { timeout, files: Vec::new() }
    }

    /// Has a file or directory be in the machine at an absolute path.
    pub(crate) fn add(&mut self, source: impl Into<PathBuf>, target: impl Into<PathBuf>) {
        self.files.push((source.into(), target.into()));
    }

    /// Boots the machine and runs a script of `sh` in the directory /job; tells what comes out as it comes, and returns the
    /// exit status of the script.
    pub(crate) fn run(
        &self,
        image: &Image,
        script: &str,
        mut tell: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<u8> {
        let dir = tempfile::tempdir()?;
        let file = |name: &str| dir.path().join(name);
        self.make_disk(image.boot(), script, &file("stage"), &file("disk"))?;
        let mut qemu = Qemu::start(image, dir.path())?;
        let deadline = Instant::now() + self.timeout;
        let mut output = qemu.0.stdout.take().context("QEMU has no output")?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "the virtual machine is stopped after {:?}; it said last\n{}",
                self.timeout,
                last_lines(&file("console"), 10)
            );
            let mut ready = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            match output.read(&mut buffer)? {
                0 => break,
                length => tell(&buffer[..length])?,
            }
        }
        qemu.0.wait()?;
        let status = fs::read_to_string(file("status")).unwrap_or_default();
        match status.trim().parse() {
            Ok(status) => Ok(status),
            Err(_) => bail!("the virtual machine broke off:\n{}", last_lines(&file("console"), 30)),
        }
    }

    /// The second disk: `boot`, `command` and all files.
    fn make_disk(&self, boot: &str, script: &str, stage: &Path, disk: &Path) -> Result<()> {
        fs::create_dir_all(stage.join("files"))?;
        fs::write(stage.join("boot"), boot)?;
        fs::write(stage.join("command"), script)?;
        for (source, target) in &self.files {
            let target = target.strip_prefix("/").context("a target in the machine is an absolute path")?;
            let target = stage.join("files").join(target);
            fs::create_dir_all(target.parent().unwrap_or(stage))?;
            checked(Command::new("cp").arg("-rL").arg(source).arg(target))?;
        }
        let size = directory_size(stage)? / MEBIBYTE * 5 / 4 + 32;
        checked(
            Command::new("mke2fs")
                .args(["-q", "-F", "-t", "ext4", "-d"])
                .arg(stage)
                .arg(disk)
                .arg(format!("{size}M")),
        )?;
        Ok(fs::remove_dir_all(stage)?)
    }
}

/// A running QEMU, which is killed when dropped, or when the thread that started it ends.
struct Qemu(Child);

impl Qemu {
    fn start(image: &Image, dir: &Path) -> Result<Self> {
        let disk = |id: &str, file: &Path| {
            let file = file.display();
            let drive = format!("file={file},if=none,id={id},format=raw,snapshot=on,cache=unsafe");
            ["-drive".to_owned(), drive, "-device".to_owned(), format!("virtio-blk-pci,drive={id}")]
        };
        let port = |id: &str, number: u8, chardev: &str| {
            let device = format!("virtserialport,chardev={id},nr={number}");
            ["-chardev".to_owned(), format!("{chardev},id={id}"), "-device".to_owned(), device]
        };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "2048", "-cpu", "max"])
            .args(["-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot"])
            .arg("-serial")
            .arg(format!("file:{}", dir.join("console").display()))
            .arg("-kernel")
            .arg(image.kernel())
            .arg("-initrd")
            .arg(image.initramfs())
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=1"])
            .args(disk("root", &image.root()))
            .args(disk("job", &dir.join("disk")))
            .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
            // QEMU's own "stdio" would close the port at the end of its input.
            .args(port("output", 1, "file,path=/dev/stdout"))
            .args(port("status", 2, &format!("file,path={}", dir.join("status").display())))
            // Where QEMU keeps what is written to the disks.
            .env("TMPDIR", dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        // SAFETY: prctl is a bare system call, which a child may make between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?));
        }
        Ok(Self(command.spawn().context("cannot run qemu-system-x86_64")?))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a program to its end; a failure carries its stderr.
pub(crate) fn checked(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

fn directory_size(dir: &Path) -> Result<u64> {
    let mut size = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // Of a directory, and of each file, something is left for the file system itself.
        size += 4096;
        size += if entry.file_type()?.is_dir() {
            directory_size(&entry.path())?
        } else {
            entry.metadata()?.len()
        };
    }
    Ok(size)
}

fn last_lines(file: &Path, count: usize) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The image, if it was built. That it can be is for `cargo xtask test` to demand, which builds it first.
    fn image() -> Result<Option<Image>> {
        let image = Some(Image::wanted()?).filter(|image| image.root().exists());
        if image.is_none() {
            eprintln!("skipped: the virtual machine is not built; run cargo xtask vm build");
        }
        Ok(image)
    }

    #[test]
    fn a_script_has_its_files_and_its_output_and_exit_status_come_back() -> Result<()> {
        let Some(image) = image()? else { return Ok(()) };
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("inner"))?;
        fs::write(dir.path().join("inner/file"), "contents\n")?;
        let mut job = Job::new(Duration::from_secs(120));
        job.add(dir.path(), "/some/where");
        let mut output = Vec::new();
        let script = "cat /some/where/inner/file; echo error >&2; id -u; exit 7";
        let status = job.run(&image, script, |piece| {
            output.extend_from_slice(piece);
            Ok(())
        })?;
        assert_eq!(String::from_utf8(output)?, "contents\nerror\n0\n");
        assert_eq!(status, 7);
        Ok(())
    }

    #[test]
    fn a_machine_is_killed_when_its_time_is_up_and_when_it_breaks_off() -> Result<()> {
        let Some(image) = image()? else { return Ok(()) };
        let run = |timeout, script| {
            let job = Job::new(Duration::from_secs(timeout));
            job.run(&image, script, |_| Ok(())).unwrap_err().to_string()
        };
        assert!(run(1, "true").contains("is stopped after 1s"));
        let crashed = run(120, "echo c >/proc/sysrq-trigger");
        // A trace of the kernel's stack, which is of any length.
        assert!(crashed.contains("broke off") && crashed.contains("entry_SYSCALL_64"), "{crashed}");
        let children = fs::read_to_string("/proc/thread-self/children")?;
        assert_eq!(children, "", "no QEMU is left");
        Ok(())
    }
}
