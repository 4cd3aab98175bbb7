{{- define "nanovllm.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "nanovllm.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "nanovllm.labels" -}}
{{ include "nanovllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "nanovllm.secret" -}}
{{ .Values.keys.existingSecret | default (printf "%s-keys" (include "nanovllm.name" .)) }}
{{- end }}

{{- define "nanovllm.hasSecret" -}}
{{- if or .Values.keys.existingSecret .Values.keys.api .Values.keys.admin }}yes{{ end }}
{{- end }}
