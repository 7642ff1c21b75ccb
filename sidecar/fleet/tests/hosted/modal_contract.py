"""What Modal's own client says of the messages that tests/specs/modal/contract.json is about: `modal_contract.py > tests/specs/modal/contract.json`."""

import json

from google.protobuf.descriptor import FieldDescriptor as F
from modal_proto import api_pb2, task_command_router_pb2

CLIENT = """AppGetOrCreate AuthTokenGet ImageGetOrCreate ImageJoinStreaming SandboxCreate SandboxGetFromName SandboxGetFromNameV2 SandboxGetLogs
SandboxGetTaskId SandboxGetTunnels SandboxList SandboxListV2 SandboxTagsGet SandboxTagsSet SandboxTerminate SandboxWait SecretGetOrCreate
TaskGetCommandRouterAccess"""
ROUTER = "TaskExecPoll TaskExecStart TaskExecStdinWrite TaskExecStdioRead TaskExecWait"

TYPES = {getattr(F, "TYPE_" + name.upper()): name for name in "double float int64 uint64 int32 bool string message bytes uint32 enum".split()}
methods, messages, enums = {}, {}, {}


def add(message):
    if message.full_name in messages:
        return
    fields = messages[message.full_name] = {}
    for field in message.fields:
        kind = TYPES[field.type]
        what = field.message_type or field.enum_type
        # Name, type, what it is made of, and whether it is there more than once.
        fields[str(field.number)] = [field.name, kind, what.full_name if what else "", bool(field.is_repeated)]
        if field.message_type:
            add(field.message_type)
        if field.enum_type:
            enums[what.full_name] = {value.name: value.number for value in what.values}


for file, name, which in [(api_pb2, "ModalClient", CLIENT), (task_command_router_pb2, "TaskCommandRouter", ROUTER)]:
    service = file.DESCRIPTOR.services_by_name[name]
    for method in which.split():
        method = service.methods_by_name[method]
        methods[f"/{service.full_name}/{method.name}"] = [method.input_type.full_name, method.output_type.full_name]
        add(method.input_type)
        add(method.output_type)
add(api_pb2.RPCStatus.DESCRIPTOR)
add(api_pb2.RPCRetryPolicy.DESCRIPTOR)

# A line each, so that what changes is seen.
lines = []
for part, of in [("methods", methods), ("messages", messages), ("enums", enums)]:
    inner = ",\n".join(f"{json.dumps(name)}: {json.dumps(of[name])}" for name in sorted(of))
    lines.append(f"{json.dumps(part)}: {{\n{inner}\n}}")
print("{\n" + ",\n".join(lines) + "\n}")
