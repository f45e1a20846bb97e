#!/usr/bin/env bash
# The passwords of an MLflow server, made once:
#
#   mlflow-secrets.sh
#
# cluster/.env for the server (compose.yaml reads it, and a Kubernetes Secret is made of it), and
# ~/.mlflow/credentials, from which MLflow's clients on this machine take user and password. Both are for you alone
# (mode 600), and neither is printed.
set -euo pipefail
umask 077

server=$(cd "$(dirname "$0")" && pwd)/.env
client=$HOME/.mlflow/credentials
if [ -e "$server" ]; then
  echo "mlflow-secrets.sh: $server exists; move it away for new passwords" >&2
  exit 2
fi
command -v openssl > /dev/null || { echo "mlflow-secrets.sh: openssl is not installed" >&2; exit 2; }

# printf is the shell's own: nothing of this is ever on a command line.
password=$(openssl rand -hex 32)
{
  printf 'POSTGRES_PASSWORD=%s\n' "$(openssl rand -hex 32)"
  printf 'MLFLOW_FLASK_SERVER_SECRET_KEY=%s\n' "$(openssl rand -hex 32)"
  printf 'MLFLOW_AUTH_ADMIN_PASSWORD=%s\n' "$password"
} > "$server"
echo "made $server"
if [ -e "$client" ]; then
  echo "$client exists and stays as it is: user admin, with the password in $server"
else
  mkdir -p "$(dirname "$client")"
  printf '[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = %s\n' "$password" > "$client"
  echo "made $client"
fi
