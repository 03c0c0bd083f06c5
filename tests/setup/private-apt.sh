# An apt of our own beside the machine's: same Debian archive, own lists and cache, nothing of the
# machine changes. Sourced after shell.sh, never run. Gives `private_apt_get`, `private_apt_cache`.
# shellcheck shell=bash

apt_state=$lab/apt

private_apt_get() { APT_CONFIG=$apt_state/apt.conf apt-get "$@"; }
private_apt_cache() { APT_CONFIG=$apt_state/apt.conf apt-cache "$@"; }

# write_apt_configuration SOURCES: writes a configuration that reads the machine's sources ("machine") or only ours.
write_apt_configuration() {
  local sources=$1
  mkdir -p "$apt_state"/{lists/partial,cache/archives/partial}
  : >"$apt_state/nothing"
  {
    [ "$sources" = machine ] ||
      printf 'Dir::Etc::sourcelist "%s";\nDir::Etc::sourceparts "/dev/null";\n' "$sources"
    cat <<CONF
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "$apt_state/lists";
Dir::State::status "$apt_state/nothing";
Dir::Cache "$apt_state/cache";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Get::AllowUnauthenticated "false";
APT::Update::Error-Mode "any";
Acquire::Retries "5";
Acquire::http::Timeout "30";
Acquire::Languages "none";
CONF
  } >"$apt_state/apt.conf"
}

# The archives that the machine's own sources name, as apt itself understood them, whatever the
# notation: `URI suite component source-file`, Debian 12's only, and only those whose index is here.
known_archives() {
  local uri suite component origin entry index
  private_apt_get indextargets 'Created-By: Packages' 'Architecture: amd64' \
    --format '$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(SOURCESENTRY)|$(FILENAME)' |
    while IFS='|' read -r uri suite component origin entry index; do
      case $origin/$suite in Debian/bookworm*) ;; *) continue ;; esac
      [ -e "$index" ] && printf '%s %s %s %s\n' "$uri" "$suite" "$component" "${entry%:*}"
    done
}

has_main_archive() { known_archives | awk '$2 == "bookworm" && $3 == "main" { found = 1 } END { exit !found }'; }

# A third party's broken source must not stop us: what counts is that Debian's own index came.
read_machine_sources() {
  write_apt_configuration machine
  private_apt_get -qq update >"$apt_state/update.log" 2>&1 || true
  has_main_archive || { tail -5 "$apt_state/update.log" >&2; return 1; }
}

# signed_by FILE: the key file that a source file names, or Debian's own, or nothing (then apt's trusted keys).
signed_by() {
  local key
  key=$(sed -n -e 's/^[Ss]igned-[Bb]y:[[:space:]]*\(\/[^[:space:]]*\).*/\1/p' \
    -e 's/^deb .*signed-by=\(\/[^] ,]*\).*/\1/p' "$1" | sed -n 1p)
  [ -n "$key" ] || key=/usr/share/keyrings/debian-archive-keyring.gpg
  [ ! -e "$key" ] || printf '[signed-by=%s] ' "$key"
}

write_own_sources() {
  known_archives | sort -u | while read -r uri suite component file; do
    printf 'deb %s%s %s %s\n' "$(signed_by "$file")" "$uri" "$suite" "$component"
    # Backports live in the main archive, beside the release.
    [ "$suite/$component" != bookworm/main ] ||
      printf 'deb %s%s bookworm-backports main\n' "$(signed_by "$file")" "$uri"
  done | sort -u >"$apt_state/sources.list"
}

has_backports() { private_apt_cache policy | grep 'n=bookworm-backports' >/dev/null; }

update_own_sources() { private_apt_get -qq update && has_backports; }

# Makes the private apt ready, once a day at most.
open_private_apt() {
  if [ -s "$apt_state/sources.list" ] && [ -n "$(find "$apt_state/fresh" -mmin -1440 2>/dev/null)" ]; then return 0; fi
  say "reading the package indexes of Debian 12 and its backports"
  retry 5 read_machine_sources || die "the apt sources of this machine name no Debian 12 (bookworm) archive that answers"
  write_own_sources
  write_apt_configuration "$apt_state/sources.list"
  retry 5 update_own_sources || die "cannot read the index of bookworm-backports (sources: $apt_state/sources.list)"
  touch "$apt_state/fresh"
}

# turn_to_suite SUITE STATE: from here on the apt of our own reads that suite of the same archive, and keeps its state
# apart: it would take what is newer for what the other set-ups need.
turn_to_suite() {
  local line
  line=$(awk -v to=" $1 main" '/ bookworm main$/ && !done { sub(/ bookworm main$/, to); print; done = 1 }' "$apt_state/sources.list")
  [ -n "$line" ] || die "$apt_state/sources.list names no archive of Debian 12"
  apt_state=$2
  write_apt_configuration "$apt_state/sources.list"
  printf '%s\n' "$line" >"$apt_state/sources.list"
}

# download_packages PACKAGE...: with all that they need, to $apt_state/packages.
download_packages() {
  mkdir -p "$apt_state/packages/partial"
  private_apt_get -qq -y -o Dir::Cache::archives="$apt_state/packages" --download-only install "$@"
}
