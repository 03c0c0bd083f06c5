#!/bin/bash
# Makes a .deb and a .rpm of a program that is there, and of deploy/. The same input gives the same bytes.
#   usage: build.sh PROGRAM OUT [VERSION]       needs dpkg-deb, binutils, gzip; rpmbuild for the .rpm
#   COMPRESSION=none: soon done, for tests      FORMATS="deb rpm"
set -euo pipefail
export LC_ALL=C
umask 022

package=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$package/../.." && pwd)
deploy=$checkout/deploy
program=$(realpath "$1") out=$(realpath -m "$2")
version=${3:-$("$program" --version | cut -d' ' -f2)}

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$checkout" log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tree=$work/tree
doc=$tree/usr/share/doc/vmferry

put() { install -D -m "$1" "$2" "$tree/$3"; }

# What is the same on every system.
common() {
  install -D -m755 "$program" "$tree/usr/bin/vmferry"
  strip --strip-unneeded "$tree/usr/bin/vmferry"
  local unit
  for unit in "$deploy"/*.{service,socket,slice,timer}; do
    [ ! -e "$unit" ] || put 644 "$unit" "usr/lib/systemd/system/$(basename "$unit")"
  done
  put 644 "$deploy/sysusers.d/vmferry.conf" usr/lib/sysusers.d/vmferry.conf
  put 644 "$deploy/tmpfiles.d/vmferry.conf" usr/lib/tmpfiles.d/vmferry.conf
  put 644 "$deploy/polkit-1/rules.d/50-vmferry.rules" usr/share/polkit-1/rules.d/50-vmferry.rules
  put 644 "$deploy/vmferry.toml" etc/vmferry/vmferry.toml
  "$program" manual "$tree/usr"
  gzip -9n "$tree"/usr/share/man/man1/*.1
  install -d "$doc/examples"
  cp "$checkout"/{README.md,ARCHITECTURE.md} "$doc/"
  cp -r "$checkout/docs" "$doc/docs"
  install -D -m644 "$checkout/certs/README.md" "$doc/certs/README.md"
  install -D -m644 "$deploy/README.md" "$doc/deploy/README.md"
  # Whatever nobody else reads is an example.
  local entry
  for entry in "$deploy"/*; do
    case ${entry##*/} in
    *.service | *.socket | *.slice | *.timer | sysusers.d | tmpfiles.d | polkit-1 | package | README.md) ;;
    *) cp -r "$entry" "$doc/examples/" ;;
    esac
  done
}

# Times and modes do not tell when and by whom it was made.
even_out() {
  find "$tree" -type d -exec chmod 755 {} +
  find "$tree" -type f ! -path '*/bin/*' ! -path '*/DEBIAN/*' -exec chmod 644 {} +
  find "$tree" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
}

# The newest of glibc's symbols that the program needs.
glibc() { objdump -T "$tree/usr/bin/vmferry" | grep -o 'GLIBC_2\.[0-9]*' | sort -Vu | tail -1 | cut -d_ -f2; }

deb() {
  local meta=$tree/DEBIAN architecture size file
  architecture=$(dpkg --print-architecture)
  gzip -9nc "$package/deb/changelog" >"$doc/changelog.gz"
  sed -e "/@MIT@/{r /dev/stdin" -e "d}" "$package/deb/copyright" \
    < <(tail -n +5 "$checkout/LICENSE-MIT" | sed 's/^$/./; s/^/ /') >"$doc/copyright"
  put 644 "$package/deb/lintian-overrides" usr/share/lintian/overrides/vmferry
  install -d "$meta"
  for file in postinst prerm postrm; do install -m755 "$package/deb/$file" "$meta/$file"; done
  echo /etc/vmferry/vmferry.toml >"$meta/conffiles"
  even_out
  size=$(du -sk --exclude=DEBIAN "$tree" | cut -f1)
  sed -e "s/@VERSION@/$version/; s/@ARCHITECTURE@/$architecture/; s/@SIZE@/$size/; s/@GLIBC@/$(glibc)/" \
    "$package/deb/control" >"$meta/control"
  (cd "$tree" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$meta/md5sums"
  dpkg-deb --root-owner-group -Z"${COMPRESSION:-xz}" --build "$tree" "$out/vmferry_${version}_$architecture.deb"
  rm -rf "$meta" "$doc/changelog.gz" "$doc/copyright" "$tree/usr/share/lintian"
}

rpm() {
  local zsh=$tree/usr/share/zsh
  mv "$zsh/vendor-completions" "$zsh/site-functions"
  cp "$checkout"/LICENSE-{MIT,APACHE} "$doc/"
  even_out
  rpmbuild -bb --quiet --define "_topdir $work/rpm" --define "_rpmdir $out" --define "tree $tree" \
    --define "package_version ${version//-/\~}" --define "_docdir /usr/share/doc" --define "_buildhost localhost" \
    --define "use_source_date_epoch_as_buildtime 1" --define "clamp_mtime_to_source_date_epoch 1" \
    --define "_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" "$package/vmferry.spec"
}

mkdir -p "$out"
common
for format in ${FORMATS:-deb rpm}; do "$format"; done
ls "$out"/vmferry[-_]"$version"*
