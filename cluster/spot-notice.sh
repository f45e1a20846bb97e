#!/usr/bin/env bash
# Tells Ray that this node is about to be taken back (spot instance, preemptible VM), so that a run can save a
# checkpoint in time; without it the node is just gone, and the steps since the last checkpoint are trained again.
#
#   spot-notice.sh aws|gcp
#
# Waits, as long as the node lives, for the notice of the cloud's metadata service: two minutes ahead on AWS, 30
# seconds on GCP. On an on-demand node it never comes.
set -uo pipefail

cloud=${1:-}
aws=${AWS_METADATA:-http://169.254.169.254}
gcp=${GCP_METADATA:-http://metadata.google.internal}

noticed() {
  case $cloud in
    aws)
      local session
      session=$(curl -sf -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$aws/latest/api/token") &&
        printf 'X-aws-ec2-metadata-token: %s' "$session" |
        curl -sf -m 5 -o /dev/null -H @- "$aws/latest/meta-data/spot/instance-action"
      ;;
    gcp)
      [ "$(curl -sf -m 5 -H 'Metadata-Flavor: Google' "$gcp/computeMetadata/v1/instance/preempted")" = TRUE ]
      ;;
  esac
}

case $cloud in
  aws) period=5 seconds=110 ;;
  gcp) period=2 seconds=25 ;;
  *)
    echo "usage: spot-notice.sh aws|gcp" >&2
    exit 2
    ;;
esac
# Asked for now, not when time is short. `ray drain-node` does not know of itself on which node it is.
node=$(python -c "
import ray

ray.init(address='auto', log_to_driver=False, logging_level='ERROR')
print(ray.get_runtime_context().get_node_id())
" | tail -n 1) || { echo "spot-notice.sh: no Ray runs on this node" >&2; exit 1; }
until noticed; do
  sleep "$period"
done
exec ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "the cloud takes the node back" --deadline-remaining-seconds "$seconds"
