#!/bin/bash
# Programs of other people judge a running agent: openssl, sslyze and tlsfuzzer its port, schemathesis its API.
#   usage: judges.sh [openssl] [sslyze] [tlsfuzzer] [schemathesis]      all of them if none is named
# Python's programs are installed into .lab/judges from requirements.txt, by their hashes. tlsfuzzer is in no
# package registry: TLSFUZZER names a checkout, else the archive of the commit below is downloaded (from
# TLSFUZZER_ARCHIVES, if GitHub is not to be reached), and what it would have run is held to its SHA-256.
# What is expected is in docs/judges.md, and in expected.txt here; anything else is a failure.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup/shell.sh"

here=$checkout/tests/judges
room=$lab/judges
commit=14555fe211456c46deccc4b2d94751dbd894aece
programs=feb30c23053aebd3ed35220548bf81fa7d868661a86b3292b5495837327947db
archives=${TLSFUZZER_ARCHIVES:-https://codeload.github.com/tlsfuzzer/tlsfuzzer/tar.gz}
run=$room/run
python=$room/venv/bin/python

install_python() {
  local this
  this=$(recipe "$here/requirements.txt")
  is_made "$room/venv" "$this" && return
  lock_lab
  rm -rf "$room/venv"
  python3 -m venv "$room/venv" || die "python3 has no venv: apt-get install python3-venv"
  retry 5 "$room/venv/bin/pip" -q install --require-hashes -r "$here/requirements.txt"
  mark_made "$room/venv" "$this"
}

fetch_tlsfuzzer() {
  [ -z "${TLSFUZZER:-}" ] || { tlsfuzzer=$TLSFUZZER; return; }
  tlsfuzzer=$room/tlsfuzzer-$commit
  [ -d "$tlsfuzzer" ] || {
    retry 3 curl -fsSL -o "$room/tlsfuzzer.tar.gz" "$archives/$commit" ||
      die "tlsfuzzer cannot be downloaded: TLSFUZZER=a checkout of $commit"
    rm -rf "$tlsfuzzer.new"
    mkdir "$tlsfuzzer.new"
    tar -xzf "$room/tlsfuzzer.tar.gz" -C "$tlsfuzzer.new" --strip-components=1
    [ "$(programs_of "$tlsfuzzer.new")" = "$programs" ] || die "what was downloaded has other programs than $commit"
    mv "$tlsfuzzer.new" "$tlsfuzzer"
  }
}

# The SHA-256 of all that is run of a checkout.
programs_of() {
  (cd "$1" && find scripts tlsfuzzer -name '*.py' -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
}

# An authority with RSA keys: most of tlsfuzzer's scripts offer no other signatures.
certificates() {
  local host
  openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 30 -subj /CN=judges \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
  for host in alpha bravo; do
    openssl req -newkey rsa:2048 -nodes -keyout $host.key -out $host.csr -subj /CN=$host 2>/dev/null
    printf '%s\n' "subjectAltName=DNS:$host" extendedKeyUsage=serverAuth,clientAuth \
      keyUsage=critical,digitalSignature basicConstraints=critical,CA:FALSE >$host.ext
    openssl x509 -req -in $host.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile $host.ext -out $host.pem 2>/dev/null
    chmod 600 $host.key
  done
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start() {
  rm -rf "$run"
  mkdir -p "$run"
  cd "$run"
  certificates
  port=$(free_port)
  printf '%s\n' "state_dir = 'state'" "runtime_dir = 'run'" "listen = ['127.0.0.1:$port']" \
    '[tls]' "ca = 'ca.pem'" "cert = 'alpha.pem'" "key = 'alpha.key'" \
    '[peer.bravo]' "identity = 'bravo'" "send = ['*']" '[vm.web1]' "qmp = 'web1.qmp'" >vmferry.toml
  "$checkout/target/debug/vmferry" agent --config vmferry.toml 2>agent.log &
  pids=$!
  trap 'kill $pids 2>/dev/null || :' EXIT
  local tries
  for tries in $(seq 100); do
    [ -S run/vmferry.sock ] && return
    sleep 0.1
  done
  die "the agent does not start: $(tail -3 agent.log)"
}

client=(-connect "" -CAfile ca.pem -alpn vmferry/1)

# with WORDS...: what s_client says.
with() { client[1]=127.0.0.1:$port; timeout 30 openssl s_client "${client[@]}" "$@" </dev/null 2>&1 || :; }

judge_openssl() {
  local own=(-cert bravo.pem -key bravo.key) version
  with "${own[@]}" -tls1_3 | grep -q 'Verify return code: 0 (ok)' || fails "TLS 1.3 with a certificate"
  with "${own[@]}" -tls1_3 | grep -q 'Early data was not sent' || fails "early data"
  with "${own[@]}" -tls1_3 | grep -q 'New Session Ticket' && fails "a session ticket was sent"
  for version in -tls1_2 -tls1_1 -tls1; do
    with "${own[@]}" $version | grep -q 'Cipher is (NONE)' || fails "s_client $version"
  done
  with -tls1_3 -ign_eof | grep -q 'alert certificate required' || fails "no certificate"
  with "${own[@]}" -tls1_3 -sigalgs RSA+SHA256 | grep -q 'alert handshake failure' || fails "a signature of PKCS #1"
  with "${own[@]}" -tls1_3 -alpn h2 | grep -q 'alert no application protocol' || fails "another protocol"
}

judge_sslyze() {
  "$python" -W ignore -m sslyze --quiet --mozilla_config disable --sslv2 --sslv3 --tlsv1 --tlsv1_1 --tlsv1_2 --tlsv1_3 \
    --resum --compression --openssl_ccs --heartbleed --reneg --cert bravo.pem --key bravo.key --json_out=sslyze.json "127.0.0.1:$port" || :
  "$python" "$here/sslyze_verdict.py" sslyze.json || fails sslyze
}

# Not run: those that send HTTP of every length or measure times, and those that want clients' keys of other kinds.
not_run=" lengths minerva ecdsa-brainpool-in-certificate-verify ecdsa-in-certificate-verify \
  eddsa-in-certificate-verify mldsa-in-certificate-verify "

judge_tlsfuzzer() {
  local script name
  fetch_tlsfuzzer
  for script in "$tlsfuzzer"/scripts/test-tls13-*.py; do
    script=$(basename "$script") name=${script#test-tls13-}
    case $not_run in *" ${name%.py} "*) continue ;; esac
    timeout 900 "$python" "$here/tlsfuzzer_client.py" "$tlsfuzzer" bravo.pem bravo.key "$script" -h 127.0.0.1 -p "$port" \
      >"$script.log" 2>&1 || :
  done
  "$python" "$here/tlsfuzzer_verdict.py" "$here/expected.txt" test-tls13-*.log || fails "tlsfuzzer"
}

judge_schemathesis() {
  local bridge
  bridge=$(free_port)
  "$python" "$here/bridge.py" "$bridge" run/vmferry.sock &
  pids="$pids $!"
  retry 5 curl -fsS -o /dev/null "http://127.0.0.1:$bridge/v1/status"
  "$room/venv/bin/schemathesis" run "http://127.0.0.1:$bridge/v1/openapi.json" --max-examples "${EXAMPLES:-15}" \
    --request-timeout 60 --no-color || fails schemathesis
}

failed=""
fails() { say "FAILED: $*"; failed="$failed; $*"; }

mkdir -p "$room"
install_python
start
for judge in ${*:-openssl sslyze tlsfuzzer schemathesis}; do
  printf '\n== %s\n' "$judge"
  "judge_$judge"
done
kill -0 "${pids%% *}" || fails "the agent has ended: $(tail -3 agent.log)"
grep -q panicked agent.log && fails "the agent has panicked: $run/agent.log"
[ -z "$failed" ] || die "failed$failed"
say "all as expected"
