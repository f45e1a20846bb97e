#!/usr/bin/env bash
# Certificates for TLS between the nodes of a Ray cluster (gRPC; the dashboard stays plain HTTP).
#
#   certificates.sh DIR HOST_OR_IP...
#
# Makes DIR/ca.crt and ca.key, and DIR/node.crt and node.key, a certificate for all the names and addresses given:
# one for the whole cluster where its addresses are known. Where ca.crt and ca.key are there already, they sign it:
# so a node that has just got its address makes its own. Ray demands a certificate of both sides, and all nodes and
# clients must have one of the same authority. Whoever has ca.key can join the cluster: keep it where nodes do not
# need it.
set -euo pipefail
umask 077

fail() {
  echo "certificates.sh: $1" >&2
  exit 2
}

[ $# -ge 2 ] || fail "usage: certificates.sh DIR HOST_OR_IP... (every name and address by which nodes are reached)"
command -v openssl > /dev/null || fail "openssl is not installed"
dir=$1
shift

byte='(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])'
names=
for host in "$@"; do
  if [[ $host =~ ^($byte\.){3}$byte$ || $host =~ ^[0-9A-Fa-f:]*:[0-9A-Fa-f:.]+$ ]]; then
    names+=",IP:$host"
  elif [[ $host =~ ^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9])?$ && ! $host =~ ^[0-9.]+$ ]]; then
    names+=",DNS:$host"
  else
    fail "'$host' is neither a host name nor an IP address"
  fi
done

mkdir -p "$dir" || fail "cannot make $dir"
dir=$(cd "$dir" && pwd)
for file in node.crt node.key; do
  [ ! -e "$dir/$file" ] || fail "$dir/$file exists; move it away, or name another folder"
done
work=$(mktemp -d "$dir/.new-XXXXXX") || fail "cannot write in $dir"
trap 'rm -rf "$work"' EXIT

quietly() {
  openssl "$@" 2> "$work/error" || fail "openssl $1: $(tail -n 1 "$work/error")"
}

key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1)
if [ -e "$dir/ca.crt" ] && [ -e "$dir/ca.key" ]; then
  cp "$dir/ca.crt" "$dir/ca.key" "$work"
elif [ -e "$dir/ca.crt" ] || [ -e "$dir/ca.key" ]; then
  fail "$dir has only one of ca.crt and ca.key"
else
  quietly req -x509 "${key[@]}" -nodes -sha256 -days 3650 -subj "/CN=distmaml Ray CA" \
    -addext keyUsage=critical,keyCertSign,cRLSign -keyout "$work/ca.key" -out "$work/ca.crt"
fi

# Both uses: a node is a server for the others, and their client.
cat > "$work/extensions" << END
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth,clientAuth
subjectAltName = ${names#,}
END
quietly req -new "${key[@]}" -nodes -subj "/CN=distmaml Ray node" -keyout "$work/node.key" -out "$work/node.csr"
quietly x509 -req -sha256 -days 825 -in "$work/node.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" \
  -set_serial "0x$(openssl rand -hex 16)" -extfile "$work/extensions" -out "$work/node.crt"
quietly verify -CAfile "$work/ca.crt" "$work/node.crt" > /dev/null

chmod 600 "$work"/*.key
chmod 644 "$work"/*.crt
mv -f "$work/ca.crt" "$work/ca.key" "$work/node.key" "$work/node.crt" "$dir"

cat << END
export RAY_USE_TLS=1
export RAY_TLS_SERVER_CERT=$dir/node.crt
export RAY_TLS_SERVER_KEY=$dir/node.key
export RAY_TLS_CA_CERT=$dir/ca.crt
END
