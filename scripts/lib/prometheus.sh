# shellcheck shell=bash
# Sourced after environment.sh. Prometheus and promtool, for rules and dashboard: those
# in PATH, or else Debian's package, unpacked beside the virtual environment (no root).

# Puts them into PATH.
#   HASHEVICT_NO_PROMETHEUS=1  do without, where there is neither them nor Debian
find_prometheus() {
    command -v promtool >/dev/null && command -v prometheus >/dev/null && return
    local folder=$VENV/prometheus
    if [[ ! -x $folder/usr/bin/promtool ]]; then
        say "fetching Debian's package prometheus into $folder"
        mkdir -p "$folder"
        (cd "$folder" && apt-get download -qq prometheus && dpkg -x prometheus_*.deb .) || {
            rm -rf "$folder"
            [[ ${HASHEVICT_NO_PROMETHEUS:-} == 1 ]] ||
                die "no promtool, and apt-get could not fetch the package prometheus;" \
                    "install it, or set HASHEVICT_NO_PROMETHEUS=1 to skip its checks."
            return 1
        }
    fi
    export PATH="$folder/usr/bin:$PATH"
}
