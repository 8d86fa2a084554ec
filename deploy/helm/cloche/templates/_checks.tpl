{{/* What values.schema.json cannot say, because it takes two values, or the cluster, to see it. */}}
{{- define "cloche.check" -}}
{{- $sandbox := .Values.app.sandbox }}
{{- $kubernetes := $sandbox.kubernetes }}
{{- if include "cloche.usesCluster" . }}
{{- if eq $kubernetes.namespace .Release.Namespace }}
{{- fail (printf "\napp.sandbox.kubernetes.namespace: %q is the namespace of the release. Runs need one of their own: there, whoever may make a Job could take the service's token. Give another name." $kubernetes.namespace) }}
{{- end }}
{{- if and $kubernetes.admissionPolicy.enabled (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "\napp.sandbox.kubernetes.admissionPolicy.enabled: ValidatingAdmissionPolicy needs Kubernetes 1.30, and this is %s. Set it to false, and read in the chart's README what you then do without." .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- $memory := include "cloche.bytes" $kubernetes.podResources.limits.memory | int64 }}
{{- $cpu := include "cloche.millicores" $kubernetes.podResources.limits.cpu | int64 }}
{{- if $kubernetes.limitRange.enabled }}
{{- if gt $memory (include "cloche.bytes" $kubernetes.limitRange.maxMemory | int64) }}
{{- fail "\napp.sandbox.kubernetes.podResources.limits.memory is more than limitRange.maxMemory: no run would be admitted. Raise the one or lower the other." }}
{{- end }}
{{- if gt $cpu (include "cloche.millicores" $kubernetes.limitRange.maxCPU | int64) }}
{{- fail "\napp.sandbox.kubernetes.podResources.limits.cpu is more than limitRange.maxCPU: no run would be admitted. Raise the one or lower the other." }}
{{- end }}
{{- end }}
{{- if $kubernetes.quota.enabled }}
{{- if gt $memory (include "cloche.bytes" $kubernetes.quota.maxMemory | int64) }}
{{- fail "\napp.sandbox.kubernetes.podResources.limits.memory is more than quota.maxMemory, which is for all runs together: none would be admitted. Raise the one or lower the other." }}
{{- end }}
{{- if gt $cpu (include "cloche.millicores" $kubernetes.quota.maxCPU | int64) }}
{{- fail "\napp.sandbox.kubernetes.podResources.limits.cpu is more than quota.maxCPU, which is for all runs together: none would be admitted. Raise the one or lower the other." }}
{{- end }}
{{- end }}
{{- if gt (int64 $kubernetes.runAsUser.first) (int64 $kubernetes.runAsUser.last) }}
{{- fail "\napp.sandbox.kubernetes.runAsUser: the first uid comes before the last." }}
{{- end }}
{{- end }}
{{- if and (eq $sandbox.mode "opensandbox") (not $sandbox.opensandbox.apiURL) }}
{{- fail "\napp.sandbox.opensandbox.apiURL: the mode opensandbox needs the address of the OpenSandbox service." }}
{{- end }}
{{- if and $sandbox.opensandbox.apiKey $sandbox.opensandbox.existingSecret }}
{{- fail "\napp.sandbox.opensandbox: give apiKey or existingSecret, not both." }}
{{- end }}
{{- if and (eq $sandbox.mode "docker") (not $sandbox.docker.host) (not $sandbox.docker.socket.hostPath) }}
{{- fail "\napp.sandbox.docker: the mode docker needs the address of a daemon: host, or socket.hostPath, which gives the service root's rights on its node." }}
{{- end }}
{{- if and $sandbox.docker.host $sandbox.docker.socket.hostPath }}
{{- fail "\napp.sandbox.docker: give host or socket.hostPath, not both." }}
{{- end }}
{{- if and .Values.tokens.existingSecret .Values.tokens.values }}
{{- fail "\ntokens: give existingSecret or values, not both." }}
{{- end }}
{{- $names := list }}
{{- $tokens := list }}
{{- range .Values.tokens.values }}
{{- $names = append $names .name }}
{{- $tokens = append $tokens .token }}
{{- end }}
{{- if or (ne (len $names) (len (uniq $names))) (ne (len $tokens) (len (uniq $tokens))) }}
{{- fail "\ntokens.values: two tokens have one name, or are the same. Give each a name and a token of its own." }}
{{- end }}
{{- if .Values.checkSecrets }}
{{- if .Values.tokens.existingSecret }}
{{- include "cloche.checkSecret" (list . "tokens.existingSecret" .Values.tokens.existingSecret "tokens") }}
{{- end }}
{{- if and (include "cloche.usesOpensandboxKey" .) $sandbox.opensandbox.existingSecret }}
{{- include "cloche.checkSecret" (list . "app.sandbox.opensandbox.existingSecret" $sandbox.opensandbox.existingSecret "apiKey") }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether a Secret is there and has a key. Where Helm only renders it sees no cluster, which shows in that it does not find the
account that every namespace has. A pod would wait for such a Secret for ever, and `helm install --wait` for five minutes. */}}
{{- define "cloche.checkSecret" -}}
{{- $top := index . 0 }}
{{- $value := index . 1 }}
{{- $name := index . 2 }}
{{- $key := index . 3 }}
{{- if lookup "v1" "ServiceAccount" $top.Release.Namespace "default" }}
{{- $found := lookup "v1" "Secret" $top.Release.Namespace $name }}
{{- if not $found }}
{{- fail (printf "\n%s: there is no Secret %q in the namespace %q. Make it first: kubectl create secret generic %s --namespace %s --from-file=%s=FILE (or set checkSecrets to false, if something makes it later)." $value $name $top.Release.Namespace $name $top.Release.Namespace $key) }}
{{- end }}
{{- if not (hasKey (default dict $found.data) $key) }}
{{- fail (printf "\n%s: the Secret %q has no key %q." $value $name $key) }}
{{- end }}
{{- end }}
{{- end }}
