"""A loopback Cloud TPU API under the real google-cloud-tpu client: quota, queue, preemption, errors.

`tick` moves every queued resource one state on; nothing happens by itself. It refuses what the
real service refuses.
"""

import contextlib
from concurrent import futures

import grpc
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2

State = tpu_v2.QueuedResourceState.State
HOLD_QUOTA = (State.PROVISIONING, State.ACTIVE, State.SUSPENDING, State.SUSPENDED)
CORES = {"v4": 2, "v5p": 2}


class FakeTpu:
    """The service.

    Attributes:
        quota: chips that may be held at a time.
        resources: queued resources by full name.
        log: (method, name) of what was asked, refused calls included.
        fail: method name -> (status code, text) with which it fails, once.
    """

    def __init__(self, quota: int = 64):
        self.quota, self.resources, self.log, self.fail = quota, {}, [], {}
        self.operations: dict[str, operations_pb2.Operation] = {}

    # What a test drives.

    def tick(self) -> None:
        for one in self.resources.values():
            if one.state.state == State.ACCEPTED:
                one.state.state = State.WAITING_FOR_RESOURCES
            elif one.state.state == State.WAITING_FOR_RESOURCES:
                if self.held() + chips(one) <= self.quota:
                    one.state.state = State.PROVISIONING
            elif one.state.state == State.PROVISIONING:
                one.state.state = State.ACTIVE

    def settle(self) -> None:
        for _ in range(3):
            self.tick()

    def preempt(self, name: str) -> None:
        """The machines are gone; the quota is held until somebody deletes the resource."""
        self._named(name).state.state = State.SUSPENDED

    def break_(self, name: str, words: str) -> None:
        one = self._named(name)
        one.state.state = State.FAILED
        one.state.failed_data.error.message = words

    def held(self) -> int:
        return sum(chips(one) for one in self.resources.values() if one.state.state in HOLD_QUOTA)

    def states(self) -> dict[str, str]:
        return {n.rpartition("/")[2]: one.state.state.name for n, one in self.resources.items()}

    def _named(self, name: str):
        return next(one for n, one in self.resources.items() if n.endswith(f"/{name}"))

    # What the client calls.

    def CreateQueuedResource(self, request, context):
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        self._enter("create", name, context)
        if name in self.resources:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"Resource '{name}' already exists")
        if wrong := mistake(request):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, wrong)
        made = tpu_v2.QueuedResource(request.queued_resource)
        made.name, made.state.state = name, State.ACCEPTED
        self.resources[name] = made
        return self._operation(tpu_v2.QueuedResource.pb(made))

    def ListQueuedResources(self, request, context):
        self._enter("list", request.parent, context)
        names = sorted(name for name in self.resources if name.startswith(f"{request.parent}/"))
        start, size = int(request.page_token or 0), 2  # small pages, so that clients must turn them
        page = [self.resources[name] for name in names[start : start + size]]
        more = str(start + size) if start + size < len(names) else ""
        return tpu_v2.ListQueuedResourcesResponse(queued_resources=page, next_page_token=more)

    def DeleteQueuedResource(self, request, context):
        self._enter("delete", request.name, context)
        one = self.resources.get(request.name)
        if one is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Resource '{request.name}' was not found")
        if one.state.state in (State.ACTIVE, State.PROVISIONING) and not request.force:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "delete the nodes first or use force"
            )
        del self.resources[request.name]
        return self._operation(empty_pb2.Empty())

    def GetOperation(self, request, context):
        return self.operations[request.name]

    def _enter(self, method: str, name: str, context) -> None:
        self.log.append((method, name.rpartition("/")[2]))
        if method in self.fail:
            context.abort(*self.fail.pop(method))

    def _operation(self, message):
        made = operations_pb2.Operation(name=f"operations/{len(self.operations)}", done=True)
        made.response.Pack(message)
        self.operations[made.name] = made
        return made


def chips(one) -> int:
    kind, _, size = one.tpu.node_spec[0].node.accelerator_type.rpartition("-")
    return int(size) // CORES.get(kind, 1)


def mistake(request) -> str:
    """Why the service would not take a request; empty if it would."""
    one = request.queued_resource
    for spec in one.tpu.node_spec:
        if spec.parent != request.parent:
            return f"node_spec.parent '{spec.parent}' does not match parent '{request.parent}'"
        name = spec.node_id or spec.multislice_params.node_id_prefix
        if not name or len(name) > 63:
            return f"node id '{name}' must have 1 to 63 characters"
        if not spec.node.runtime_version:
            return "runtime_version is required"
    if "spot" in one and ("guaranteed" in one or one.reservation_name):
        return "spot cannot be combined with a reservation"
    return ""


@contextlib.contextmanager
def serve(fake: FakeTpu):
    """The real client, connected to `fake`."""
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(fake, name),
            request_deserializer=getattr(tpu_v2, f"{name}Request").deserialize,
            response_serializer=_serialize,
        )
        for name in ("CreateQueuedResource", "ListQueuedResources", "DeleteQueuedResource")
    }
    operation = grpc.unary_unary_rpc_method_handler(
        fake.GetOperation,
        request_deserializer=operations_pb2.GetOperationRequest.FromString,
        response_serializer=_serialize,
    )
    server = grpc.server(futures.ThreadPoolExecutor(4))
    generic = grpc.method_handlers_generic_handler
    server.add_generic_rpc_handlers(
        (
            generic("google.cloud.tpu.v2.Tpu", methods),
            generic("google.longrunning.Operations", {"GetOperation": operation}),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))
    server.stop(0)


def _serialize(message) -> bytes:
    pure = hasattr(message, "SerializeToString")
    return message.SerializeToString() if pure else type(message).serialize(message)
