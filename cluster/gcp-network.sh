#!/usr/bin/env bash
# The network of a cluster on Google Cloud, its firewall and its shared disk:
#
#   gcp-network.sh PROJECT REGION ZONE SSH_FROM
#   gcp-network.sh my-project us-central1 us-central1-a 203.0.113.7/32
#
# A network without rules lets nothing in. These let in ssh from the addresses SSH_FROM, and everything from node to
# node. Prints the address of the disk, for the head of gcp.yaml. What exists already is left as it is.
set -euo pipefail

if [ $# -ne 4 ]; then
  echo "usage: gcp-network.sh PROJECT REGION ZONE SSH_FROM (your addresses, as 203.0.113.7/32)" >&2
  exit 2
fi
project=$1 region=$2 zone=$3 ssh_from=$4
if ! [[ $ssh_from =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}/(8|9|[12][0-9]|3[0-2])$ ]]; then
  echo "gcp-network.sh: SSH_FROM '$ssh_from' is not a range of your own addresses, as 203.0.113.7/32" >&2
  exit 2
fi

# Makes what `gcloud ... describe` does not find.
ensure() {
  local -a kind=()
  while [ "$1" != create ]; do
    kind+=("$1")
    shift
  done
  local name=$2 where=()
  shift 2
  case ${kind[*]} in
    *subnets) where=(--region "$region") ;;
    filestore*) where=(--zone "$zone") ;;
  esac
  gcloud "${kind[@]}" describe "$name" --project "$project" "${where[@]}" > /dev/null 2>&1 ||
    gcloud "${kind[@]}" create "$name" --project "$project" "${where[@]}" "$@"
}

ensure compute networks create distmaml --subnet-mode custom
ensure compute networks subnets create distmaml --network distmaml --range 10.10.0.0/20
ensure compute firewall-rules create distmaml-ssh --network distmaml --direction INGRESS --action ALLOW \
  --rules tcp:22 --source-ranges "$ssh_from" --target-tags distmaml
ensure compute firewall-rules create distmaml-nodes --network distmaml --direction INGRESS --action ALLOW \
  --rules all --source-tags distmaml --target-tags distmaml
ensure filestore instances create distmaml --tier BASIC_HDD --file-share name=shared,capacity=1TB \
  --network name=distmaml
gcloud filestore instances describe distmaml --project "$project" --zone "$zone" \
  --format 'value(networks[0].ipAddresses[0])'
