#!/bin/sh
# Installs packages on Debian and Ubuntu, and says so before it does, or asks for a password: tools/apt.sh PACKAGE ...
command -v apt-get >/dev/null || exit 1
[ "$(id -u)" = 0 ] && sudo= || sudo=sudo
echo "Installing $* through apt${sudo:+, with sudo, which may ask for your password}. It may take a minute."
# On a fresh machine the automatic upgrade often holds apt's lock: wait for it. And it knows no package before an update.
apt_get="$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120"
$apt_get update >/dev/null </dev/null
$apt_get install -y --no-install-recommends "$@" >/dev/null </dev/null
