"""Installs a package on Debian and Ubuntu: python3 tools/apt.py PACKAGE

As root, or with a sudo that asks for no password; nowhere else.
"""

import os
import shutil
import subprocess
import sys


def install(package: str) -> bool:
    """Install a package and say so. False where apt may not be used, or where it fails, which it tells in one line."""
    if not shutil.which("apt-get") or not _may():
        return False
    print(f"Installing the package {package} through apt; this may take a minute.", flush=True)
    done = _apt_get("install", "-y", "--no-install-recommends", package)
    if done.returncode:  # a machine that never ran `apt-get update`, or long ago, knows no package, or outdated ones
        _apt_get("update")
        done = _apt_get("install", "-y", "--no-install-recommends", package)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        print(f" [!] apt could not install {package}: {reason[-1]}", file=sys.stderr, flush=True)
    return done.returncode == 0


def _may() -> bool:
    if os.geteuid() == 0:
        return True
    if not shutil.which("sudo"):
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def _apt_get(*arguments: str) -> subprocess.CompletedProcess:
    # On a fresh machine the automatic upgrade often holds apt's lock: wait for it.
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", *arguments]
    if os.geteuid() != 0:
        command = ["sudo", "-n", *command]
    # Not subprocess.run, which would kill it on Ctrl+C: apt gets the Ctrl+C as well, and knows better when to end.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def main() -> int:
    """Install the package that the command line names."""
    if len(sys.argv) != 2:
        print("usage: apt.py PACKAGE", file=sys.stderr)
        return 2
    package = sys.argv[1]
    if install(package):
        return 0
    print(f" [!] {package} is missing, and this can't install it: sudo apt-get install {package}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
