# shellcheck shell=bash
# Sourced after environment.sh. Prometheus and promtool, for rules and dashboard: those
# in PATH, or else Debian's package, unpacked beside the virtual environment (no root).

# Puts them into PATH; fails with a sentence where there is neither them nor Debian.
find_prometheus() {
    command -v promtool >/dev/null && command -v prometheus >/dev/null && return
    local folder=$VENV/prometheus
    if [[ ! -x $folder/usr/bin/promtool ]]; then
        say "fetching Debian's package prometheus into $folder"
        mkdir -p "$folder"
        (cd "$folder" && apt-get download -qq prometheus && dpkg -x prometheus_*.deb .) || {
            rm -rf "$folder"
            say "no promtool, and apt-get could not fetch the package prometheus."
            return 1
        }
    fi
    export PATH="$folder/usr/bin:$PATH"
}
