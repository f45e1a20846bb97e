"""A strict schema of what our Kubernetes files hold: an unknown key is an error, where the API server may just drop it.

KubeRay's part has the fields of the custom resource definitions of its release 1.7.0
(https://github.com/ray-project/kuberay/tree/v1.7.0/helm-chart/kuberay-operator/crds), whose files are larger than this
repository; of pods, services and policies it has the fields that one uses, not those of every volume plugin.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
SWITCH: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"anyOf": [NUMBER, TEXT]}
PORT: Schema = {"anyOf": [NUMBER, TEXT]}


def mapping(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    """An object that has these fields and no other; a trailing underscore spells a keyword of Python."""
    properties = {name.rstrip("_"): schema for name, schema in fields.items()}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


def problems(document: Mapping[str, Any]) -> list[str]:
    """What is wrong with one document, a line each."""
    schema = KINDS.get(str(document.get("kind")))
    if schema is None:
        return [f"kind {document.get('kind')!r} is not known"]
    found: Iterator[Any] = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


# ------------------------------------------------------------------------------------------------- pods

LABEL_SELECTOR = mapping(
    matchLabels=TEXTS, matchExpressions=many(mapping(("key", "operator"), key=TEXT, operator=TEXT, values=many(TEXT)))
)
METADATA = mapping(name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS, finalizers=many(TEXT))
RESOURCES = mapping(
    limits={"type": "object", "additionalProperties": QUANTITY},
    requests={"type": "object", "additionalProperties": QUANTITY},
    claims=many(mapping(("name",), name=TEXT, request=TEXT)),
)
KEY_OF = mapping(("key", "name"), name=TEXT, key=TEXT, optional=SWITCH)
ENV = many(
    mapping(
        ("name",),
        name=TEXT,
        value=TEXT,
        valueFrom=mapping(
            secretKeyRef=KEY_OF,
            configMapKeyRef=KEY_OF,
            fieldRef=mapping(("fieldPath",), fieldPath=TEXT, apiVersion=TEXT),
            resourceFieldRef=mapping(("resource",), resource=TEXT, containerName=TEXT, divisor=QUANTITY),
        ),
    )
)
SOURCE = mapping(name=TEXT, optional=SWITCH)
ENV_FROM = many(mapping(prefix=TEXT, secretRef=SOURCE, configMapRef=SOURCE))
MOUNTS = many(
    mapping(
        ("mountPath", "name"), name=TEXT, mountPath=TEXT, readOnly=SWITCH, recursiveReadOnly=TEXT, subPath=TEXT,
        subPathExpr=TEXT, mountPropagation=TEXT
    )
)  # fmt: skip
SECCOMP = mapping(("type",), type=TEXT, localhostProfile=TEXT)
CONTAINER_SECURITY = mapping(
    allowPrivilegeEscalation=SWITCH,
    capabilities=mapping(add=many(TEXT), drop=many(TEXT)),
    privileged=SWITCH,
    readOnlyRootFilesystem=SWITCH,
    runAsGroup=NUMBER,
    runAsNonRoot=SWITCH,
    runAsUser=NUMBER,
    seccompProfile=SECCOMP,
)
_EXEC = mapping(command=many(TEXT))
_HTTP = mapping(
    ("port",),
    path=TEXT,
    port=PORT,
    host=TEXT,
    scheme=TEXT,
    httpHeaders=many(mapping(("name", "value"), name=TEXT, value=TEXT)),
)
PROBE = mapping(
    exec=_EXEC,
    httpGet=_HTTP,
    tcpSocket=mapping(("port",), port=PORT, host=TEXT),
    grpc=mapping(("port",), port=NUMBER, service=TEXT),
    initialDelaySeconds=NUMBER,
    periodSeconds=NUMBER,
    timeoutSeconds=NUMBER,
    successThreshold=NUMBER,
    failureThreshold=NUMBER,
    terminationGracePeriodSeconds=NUMBER,
)
_HOOK = mapping(exec=_EXEC, httpGet=_HTTP, sleep=mapping(("seconds",), seconds=NUMBER))
CONTAINER = mapping(
    ("name",),
    name=TEXT,
    image=TEXT,
    imagePullPolicy=choice("Always", "IfNotPresent", "Never"),
    command=many(TEXT),
    args=many(TEXT),
    workingDir=TEXT,
    env=ENV,
    envFrom=ENV_FROM,
    ports=many(mapping(("containerPort",), containerPort=NUMBER, name=TEXT, protocol=TEXT, hostPort=NUMBER)),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    volumeMounts=MOUNTS,
    livenessProbe=PROBE,
    readinessProbe=PROBE,
    startupProbe=PROBE,
    lifecycle=mapping(postStart=_HOOK, preStop=_HOOK, stopSignal=TEXT),
    restartPolicy=TEXT,
    terminationMessagePath=TEXT,
    terminationMessagePolicy=TEXT,
)
_ITEMS = many(mapping(("key", "path"), key=TEXT, path=TEXT, mode=NUMBER))
VOLUME = mapping(
    ("name",),
    name=TEXT,
    persistentVolumeClaim=mapping(("claimName",), claimName=TEXT, readOnly=SWITCH),
    secret=mapping(secretName=TEXT, items=_ITEMS, defaultMode=NUMBER, optional=SWITCH),
    configMap=mapping(name=TEXT, items=_ITEMS, defaultMode=NUMBER, optional=SWITCH),
    emptyDir=mapping(medium=TEXT, sizeLimit=QUANTITY),
    nfs=mapping(("path", "server"), server=TEXT, path=TEXT, readOnly=SWITCH),
    hostPath=mapping(("path",), path=TEXT, type=TEXT),
    csi=mapping(("driver",), driver=TEXT, readOnly=SWITCH, fsType=TEXT, volumeAttributes=TEXTS),
)
_NODE_TERM = mapping(
    matchExpressions=LABEL_SELECTOR["properties"]["matchExpressions"],
    matchFields=LABEL_SELECTOR["properties"]["matchExpressions"],
)
_POD_TERM = mapping(
    ("topologyKey",),
    labelSelector=LABEL_SELECTOR,
    topologyKey=TEXT,
    namespaces=many(TEXT),
    namespaceSelector=LABEL_SELECTOR,
)
_POD_AFFINITY = mapping(
    requiredDuringSchedulingIgnoredDuringExecution=many(_POD_TERM),
    preferredDuringSchedulingIgnoredDuringExecution=many(
        mapping(("weight", "podAffinityTerm"), weight=NUMBER, podAffinityTerm=_POD_TERM)
    ),
)
AFFINITY = mapping(
    nodeAffinity=mapping(
        requiredDuringSchedulingIgnoredDuringExecution=mapping(
            ("nodeSelectorTerms",), nodeSelectorTerms=many(_NODE_TERM)
        ),
        preferredDuringSchedulingIgnoredDuringExecution=many(
            mapping(("weight", "preference"), weight=NUMBER, preference=_NODE_TERM)
        ),
    ),
    podAffinity=_POD_AFFINITY,
    podAntiAffinity=_POD_AFFINITY,
)
POD = mapping(
    ("containers",),
    containers=many(CONTAINER),
    initContainers=many(CONTAINER),
    volumes=many(VOLUME),
    affinity=AFFINITY,
    nodeSelector=TEXTS,
    tolerations=many(mapping(key=TEXT, operator=TEXT, value=TEXT, effect=TEXT, tolerationSeconds=NUMBER)),
    securityContext=mapping(
        fsGroup=NUMBER,
        fsGroupChangePolicy=choice("OnRootMismatch", "Always"),
        runAsGroup=NUMBER,
        runAsNonRoot=SWITCH,
        runAsUser=NUMBER,
        seccompProfile=SECCOMP,
        supplementalGroups=many(NUMBER),
    ),
    automountServiceAccountToken=SWITCH,
    enableServiceLinks=SWITCH,
    hostNetwork=SWITCH,
    imagePullSecrets=many(mapping(name=TEXT)),
    priorityClassName=TEXT,
    restartPolicy=choice("Always", "OnFailure", "Never"),
    runtimeClassName=TEXT,
    schedulerName=TEXT,
    serviceAccountName=TEXT,
    terminationGracePeriodSeconds=NUMBER,
    topologySpreadConstraints=many(
        mapping(
            ("maxSkew", "topologyKey", "whenUnsatisfiable"), maxSkew=NUMBER, topologyKey=TEXT, whenUnsatisfiable=TEXT,
            labelSelector=LABEL_SELECTOR
        )
    ),
)  # fmt: skip
TEMPLATE = mapping(("spec",), metadata=METADATA, spec=POD)


# ---------------------------------------------------------------------------------------------- policies

_PEER = mapping(
    podSelector=LABEL_SELECTOR,
    namespaceSelector=LABEL_SELECTOR,
    ipBlock=mapping(("cidr",), cidr=TEXT, except_=many(TEXT)),
)
_POLICY_PORTS = many(mapping(protocol=choice("TCP", "UDP", "SCTP"), port=PORT, endPort=NUMBER))
INGRESS_RULES = many(mapping(from_=many(_PEER), ports=_POLICY_PORTS))
EGRESS_RULES = many(mapping(to=many(_PEER), ports=_POLICY_PORTS))
SERVICE_SPEC = mapping(
    ("ports",),
    type=choice("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    clusterIP=TEXT,
    selector=TEXTS,
    ports=many(
        mapping(
            ("port",), name=TEXT, port=NUMBER, targetPort=PORT, protocol=TEXT, nodePort=NUMBER, appProtocol=TEXT
        )
    ),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- KubeRay

_NETWORK_RULES = mapping(ingressRules=INGRESS_RULES, egressRules=EGRESS_RULES)
_GROUP_RULES = mapping(("groupName",), groupName=TEXT, ingressRules=INGRESS_RULES, egressRules=EGRESS_RULES)
_CREDENTIAL = mapping(value=TEXT, valueFrom=ENV["items"]["properties"]["valueFrom"])
RAY_CLUSTER_SPEC = mapping(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=mapping(mode=choice("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=SWITCH),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=mapping(
        version=choice("v1", "v2"),
        idleTimeoutSeconds=NUMBER,
        upscalingMode=choice("Default", "Aggressive", "Conservative"),
        image=TEXT,
        imagePullPolicy=TEXT,
        command=many(TEXT),
        args=many(TEXT),
        env=ENV,
        envFrom=ENV_FROM,
        resources=RESOURCES,
        securityContext=CONTAINER_SECURITY,
        volumeMounts=MOUNTS,
    ),
    gcsFaultToleranceOptions=mapping(
        backend=choice("redis", "rocksdb"),
        externalStorageNamespace=TEXT,
        redisAddress=TEXT,
        redisPassword=_CREDENTIAL,
        redisUsername=_CREDENTIAL,
        storage=mapping(
            claimName=TEXT,
            size=QUANTITY,
            storageClassName=TEXT,
            accessModes=many(TEXT),
            subPath=TEXT,
            deletionPolicy=choice("DeleteWithCluster", "Retain"),
        ),
    ),
    headGroupSpec=mapping(
        ("template",),
        template=TEMPLATE,
        rayStartParams=TEXTS,
        labels=TEXTS,
        resources=TEXTS,
        serviceType=TEXT,
        headService=mapping(apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=SERVICE_SPEC),
        enableIngress=SWITCH,
        ingressOptions={"type": "object"},
    ),
    headServiceAnnotations=TEXTS,
    managedBy=TEXT,
    networkPolicy=mapping(
        mode=choice("DenyAll", "DenyAllIngress", "DenyAllEgress"),
        head=_NETWORK_RULES,
        worker=_NETWORK_RULES,
        workerGroups=many(_GROUP_RULES),
    ),
    suspend=SWITCH,
    tlsOptions=mapping(enabled=SWITCH),
    upgradeStrategy=mapping(type=choice("Recreate", "None")),
    workerGroupSpecs=many(
        mapping(
            ("groupName", "maxReplicas", "minReplicas", "template"),
            groupName=TEXT,
            template=TEMPLATE,
            rayStartParams=TEXTS,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            numOfHosts=NUMBER,
            idleTimeoutSeconds=NUMBER,
            priority=NUMBER,
            labels=TEXTS,
            resources=TEXTS,
            suspend=SWITCH,
            scaleStrategy=mapping(workersToDelete=many(TEXT)),
        )
    ),
)
RAY_JOB_SPEC = mapping(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    rayClusterSpec=RAY_CLUSTER_SPEC,
    clusterSelector=TEXTS,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=NUMBER,
    activeDeadlineSeconds=NUMBER,
    preRunningDeadlineSeconds=NUMBER,
    backoffLimit=NUMBER,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    jobId=TEXT,
    managedBy=TEXT,
    metadata=TEXTS,
    submitterConfig=mapping(backoffLimit=NUMBER),
    submitterPodTemplate=TEMPLATE,
    suspend=SWITCH,
)


def _kind(api_version: str, spec: Schema | None = None, **fields: Schema) -> Schema:
    described = {**({"spec": spec} if spec else {}), **fields}
    return mapping(
        ("apiVersion", "kind", "metadata", *described),
        apiVersion=choice(api_version), kind=TEXT, metadata=METADATA, **described
    )  # fmt: skip


KINDS: dict[str, Schema] = {
    "RayCluster": _kind("ray.io/v1", RAY_CLUSTER_SPEC),
    "RayJob": _kind("ray.io/v1", RAY_JOB_SPEC),
    "Service": _kind("v1", SERVICE_SPEC),
    "ConfigMap": _kind("v1", data=TEXTS),
    "PersistentVolumeClaim": _kind(
        "v1",
        mapping(
            ("accessModes", "resources"),
            accessModes=many(choice("ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod")),
            resources=RESOURCES,
            storageClassName=TEXT,
            volumeMode=TEXT,
            volumeName=TEXT,
            selector=LABEL_SELECTOR,
        ),
    ),
    "Deployment": _kind(
        "apps/v1",
        mapping(
            ("selector", "template"),
            replicas=NUMBER,
            selector=LABEL_SELECTOR,
            strategy=mapping(type=choice("Recreate", "RollingUpdate")),
            template=TEMPLATE,
        ),
    ),
    "StatefulSet": _kind(
        "apps/v1",
        mapping(
            ("selector", "template"),
            replicas=NUMBER,
            selector=LABEL_SELECTOR,
            serviceName=TEXT,
            template=TEMPLATE,
        ),
    ),
    "NetworkPolicy": _kind(
        "networking.k8s.io/v1",
        mapping(
            ("podSelector", "policyTypes"),
            podSelector=LABEL_SELECTOR,
            policyTypes=many(choice("Ingress", "Egress")),
            ingress=INGRESS_RULES,
            egress=EGRESS_RULES,
        ),
    ),
}
