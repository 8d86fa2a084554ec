{{/* Names ------------------------------------------------------------------------------------------------------- */}}

{{- define "cloche.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 52 characters: the longest thing that is put after it is "-opensandbox". */}}
{{- define "cloche.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 51 | trimSuffix "-" }}
{{- else }}
{{- $name := include "cloche.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 51 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 51 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "cloche.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "cloche.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "cloche.tokensSecret" -}}
{{- default (printf "%s-tokens" (include "cloche.fullname" .)) .Values.tokens.existingSecret }}
{{- end }}

{{- define "cloche.opensandboxSecret" -}}
{{- default (printf "%s-opensandbox" (include "cloche.fullname" .)) .Values.app.sandbox.opensandbox.existingSecret }}
{{- end }}

{{- define "cloche.image" -}}
{{- $image := .Values.image }}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}

{{/* Labels. What is selected by must never change; what runs bear (app.kubernetes.io/managed-by: cloche) is cloche's own. */}}

{{- define "cloche.selectorLabels" -}}
app.kubernetes.io/name: {{ include "cloche.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: service
{{- end }}

{{- define "cloche.labels" -}}
app.kubernetes.io/name: {{ include "cloche.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Modes ------------------------------------------------------------------------------------------------------- */}}

{{/* "true" where runs may become Jobs: then, and only then, there is a namespace for them and the service has a token. */}}
{{- define "cloche.usesCluster" -}}
{{- if has .Values.app.sandbox.mode (list "kubernetes" "auto") }}true{{ end }}
{{- end }}

{{/* "true" where there is a key for the OpenSandbox service. Another mode than these two never sends it. */}}
{{- define "cloche.usesOpensandboxKey" -}}
{{- $opensandbox := .Values.app.sandbox.opensandbox }}
{{- if and (has .Values.app.sandbox.mode (list "opensandbox" "auto")) (or $opensandbox.apiKey $opensandbox.existingSecret) }}true{{ end }}
{{- end }}

{{/* Amounts ----------------------------------------------------------------------------------------------------- */}}

{{/* Bytes of an amount such as 256Mi. */}}
{{- define "cloche.bytes" -}}
{{- $text := toString . }}
{{- $number := regexFind "^[0-9]+" $text }}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- mul (int64 $number) (get $units (trimPrefix $number $text) | int64) }}
{{- end }}

{{/* Thousandths of a CPU, of an amount such as 1, 0.5 or 500m. */}}
{{- define "cloche.millicores" -}}
{{- $text := toString . }}
{{- if hasSuffix "m" $text }}
{{- trimSuffix "m" $text | int64 }}
{{- else }}
{{- round (mulf (float64 $text) 1000) 0 | int64 }}
{{- end }}
{{- end }}

{{/* What scripts ask for, times the runs that there may be: 20 × 64Mi as 1280Mi. */}}
{{- define "cloche.requestsMemory" -}}
{{- $kubernetes := .Values.app.sandbox.kubernetes }}
{{- if $kubernetes.quota.requestsMemory }}
{{- $kubernetes.quota.requestsMemory }}
{{- else }}
{{- $bytes := mul (int64 $kubernetes.quota.maxPods) (include "cloche.bytes" $kubernetes.podResources.requests.memory | int64) }}
{{- if eq (mod $bytes 1048576) 0 }}{{ div $bytes 1048576 }}Mi{{ else }}{{ $bytes }}{{ end }}
{{- end }}
{{- end }}

{{- define "cloche.requestsCPU" -}}
{{- $kubernetes := .Values.app.sandbox.kubernetes }}
{{- if $kubernetes.quota.requestsCPU }}
{{- $kubernetes.quota.requestsCPU }}
{{- else }}
{{- $millicores := mul (int64 $kubernetes.quota.maxPods) (include "cloche.millicores" $kubernetes.podResources.requests.cpu | int64) }}
{{- if eq (mod $millicores 1000) 0 }}{{ div $millicores 1000 }}{{ else }}{{ $millicores }}m{{ end }}
{{- end }}
{{- end }}

{{/* Settings ---------------------------------------------------------------------------------------------------- */}}

{{/* The service's variables. A value that is empty is not set, so that cloche's own default holds. A name of extraEnv is left
out here: the API server takes no name twice. */}}
{{- define "cloche.env" -}}
{{- $sandbox := .Values.app.sandbox }}
{{- $kubernetes := $sandbox.kubernetes }}
{{- $found := dict
  "CLOCHE_SERVE_ADDRESS" "0.0.0.0:8080"
  "CLOCHE_SERVE_TOKENS_FILE" "/etc/cloche/tokens/tokens"
  "CLOCHE_SERVE_DRAIN" .Values.app.drainSeconds
  "CLOCHE_SERVE_MAX_QUEUE" .Values.app.maxQueue
  "CLOCHE_SERVE_MAX_TIMEOUT" .Values.app.requests.maxTimeout
  "CLOCHE_SERVE_MAX_MEMORY" .Values.app.requests.maxMemory
  "CLOCHE_SERVE_MAX_CPUS" .Values.app.requests.maxCPUs
  "CLOCHE_SERVE_MAX_PIDS" .Values.app.requests.maxPids
  "CLOCHE_SERVE_IMAGES" (join "," .Values.app.requests.images)
  "CLOCHE_SERVE_NETWORK" .Values.app.requests.network
  "CLOCHE_SERVE_KEEP_BYTES" .Values.app.keepBytes
  "CLOCHE_SWEEP_EVERY" .Values.app.sweepEvery
  "CLOCHE_LOG" .Values.app.logLevel
  "CLOCHE_MODE" $sandbox.mode
  "CLOCHE_FALLBACK" $sandbox.fallback
  "CLOCHE_MIN_ISOLATION" $sandbox.minIsolation
  "CLOCHE_PROVE" $sandbox.prove
  "CLOCHE_TIMEOUT" $sandbox.timeout
  "CLOCHE_START_TIMEOUT" $sandbox.startTimeout
  "CLOCHE_QUEUE_TIMEOUT" $sandbox.queueTimeout
  "CLOCHE_IMAGE" $sandbox.image
  "CLOCHE_PULL" $sandbox.pull
  "CLOCHE_MAX_CONCURRENT" $kubernetes.maxConcurrentSandboxes
  "CLOCHE_MEMORY" $kubernetes.podResources.limits.memory
  "CLOCHE_CPUS" (divf (include "cloche.millicores" $kubernetes.podResources.limits.cpu | float64) 1000)
}}
{{- if include "cloche.usesCluster" . }}
{{- $users := $kubernetes.runAsUser }}
{{- $_ := merge $found (dict
  "CLOCHE_KUBE_NAMESPACE" $kubernetes.namespace
  "CLOCHE_KUBE_SERVICE_ACCOUNT" $kubernetes.serviceAccount
  "CLOCHE_KUBE_MEMORY_REQUEST" $kubernetes.podResources.requests.memory
  "CLOCHE_KUBE_CPU_REQUEST" (divf (include "cloche.millicores" $kubernetes.podResources.requests.cpu | float64) 1000)
  "CLOCHE_KUBE_RUN_AS_USER" (printf "%d-%d" (int64 $users.first) (int64 $users.last))
  "CLOCHE_KUBE_HOST_USERS" $kubernetes.hostUsers
  "CLOCHE_KUBE_RUNTIME_CLASS" $kubernetes.runtimeClassName
  "CLOCHE_KUBE_PRIORITY_CLASS" $kubernetes.priorityClassName
  "CLOCHE_KUBE_ARCH" $kubernetes.arch
  "CLOCHE_KUBE_IMAGE_PULL_SECRETS" (join "," $kubernetes.imagePullSecrets)
) }}
{{- range $name, $given := dict
  "NODE_SELECTOR" $kubernetes.nodeSelector
  "TOLERATIONS" $kubernetes.tolerations
  "LABELS" $kubernetes.labels
  "ANNOTATIONS" $kubernetes.annotations
}}
{{- if $given }}
{{- $_ := set $found (printf "CLOCHE_KUBE_%s" $name) (mustToRawJson $given) }}
{{- end }}
{{- end }}
{{- end }}
{{- if has $sandbox.mode (list "opensandbox" "auto") }}
{{- $_ := merge $found (dict
  "CLOCHE_OPENSANDBOX_API_URL" $sandbox.opensandbox.apiURL
  "CLOCHE_OPENSANDBOX_SERVER_PROXY" $sandbox.opensandbox.serverProxy
  "CLOCHE_SSRF_WHITELIST" (join "," $sandbox.opensandbox.ssrfWhitelist)
) }}
{{- end }}
{{- if has $sandbox.mode (list "docker" "auto") }}
{{- $host := $sandbox.docker.host }}
{{- if $sandbox.docker.socket.hostPath }}
{{- $host = "unix:///var/run/docker.sock" }}
{{- end }}
{{- $_ := set $found "CLOCHE_DOCKER_HOST" $host }}
{{- end }}
{{- range .Values.extraEnv }}
{{- $_ := unset $found .name }}
{{- end }}
{{- range $name, $given := $found }}
{{- if ne (toString $given) "" }}
- name: {{ $name }}
  value: {{ toString $given | quote }}
{{- end }}
{{- end }}
{{- if include "cloche.usesOpensandboxKey" . }}
- name: CLOCHE_OPENSANDBOX_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "cloche.opensandboxSecret" . }}
      key: apiKey
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
