#!/bin/sh
# Installs a package on Debian and Ubuntu, and says so before it does, or asks for a password: tools/apt.sh PACKAGE
command -v apt-get >/dev/null || exit 1
sudo=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || exit 1
    sudo="sudo -n"
    [ -t 0 ] && sudo=sudo
fi
echo "Installing the package $1 through apt${sudo:+, with sudo, which may ask for your password}. It may take a minute."

# On a fresh machine the automatic upgrade often holds apt's lock: wait for it.
apt_get() {
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@" </dev/null 2>&1
}
install() {
    said=$(apt_get install -y --no-install-recommends "$1")
}
# A machine that never ran `apt-get update`, or long ago, knows no package, or outdated ones.
install "$1" || { apt_get update >/dev/null; install "$1"; } && exit
echo " [!] apt could not install $1: $(echo "$said" | tail -n 1)" >&2
exit 1
