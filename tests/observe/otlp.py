"""Whether a request of OTLP in JSON, on standard input, is one: by the messages of OpenTelemetry's own package. The numbers
of traces and spans are hexadecimal there, unlike in other JSON of protobuf. Prints how many spans it has."""

import base64
import json
import sys

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

IDS = {"traceId": 16, "spanId": 8, "parentSpanId": 8}


def in_base64(value):
    if isinstance(value, list):
        return [in_base64(one) for one in value]
    if not isinstance(value, dict):
        return value
    changed = {}
    for name, one in value.items():
        if name in IDS:
            number = bytes.fromhex(one)
            if len(number) != IDS[name] or not any(number):
                sys.exit(f"{name} is {one}")
            one = base64.b64encode(number).decode()
        changed[name] = in_base64(one)
    return changed


# A field that it does not know is an error.
request = json_format.ParseDict(in_base64(json.load(sys.stdin)), ExportTraceServiceRequest())
spans = [span for of_resource in request.resource_spans for of_scope in of_resource.scope_spans for span in of_scope.spans]
for span in spans:
    if not 0 < span.start_time_unix_nano <= span.end_time_unix_nano:
        sys.exit(f"{span.name} is from {span.start_time_unix_nano} to {span.end_time_unix_nano}")
print(len(spans))
