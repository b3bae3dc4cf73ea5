"""Cameras: streams over sockets that are interrupted and reopened; always the newest frame."""

import itertools
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from sources.inputs import video as video_module
from sources.inputs.video import Camera, CameraUnavailable
from tests.support.brokers.broker_kinds import WAIT_S
from tests.support.environment.clips import frame_number, image_bytes, video_bytes
from tests.support.errors import raises_error

Serve = Callable[[socket.socket, int], None]


class StreamServer:
    """Accepts connections on a free port, one after another, and calls `serve(connection, number)` for each."""

    def __init__(self, serve: Serve) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._serve = serve
        self._thread = threading.Thread(target=self._run, name="stream-server", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                try:
                    self._serve(connection, self.connections)
                except OSError:
                    continue  # the camera closed the connection

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)


@pytest.fixture
def start_server() -> Iterator[Callable[[Serve], StreamServer]]:
    servers: list[StreamServer] = []

    def start(serve: Serve) -> StreamServer:
        servers.append(StreamServer(serve))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def camera(device: str, name: str = "camera", encoding: str = "jpeg") -> Camera:
    return Camera(SourceTable.model_validate({"kind": "camera", "device": device, "name": name, "encoding": encoding}))


def send_mjpeg(connection: socket.socket, frames: Iterator[int], sent: Callable[[int], None]) -> None:
    """Send MJPEG over HTTP, as network cameras do; `sent(index)` is called after each frame."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=frame\r\n\r\n")
    for index in frames:
        jpeg = image_bytes("JPEG", index % 30)
        head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
        connection.sendall(head + jpeg + b"\r\n")
        sent(index)


def test_slow_consumer_gets_the_newest_frame(start_server: Callable[[Serve], StreamServer]) -> None:
    closed = threading.Event()

    def pause(index: int) -> None:
        if closed.wait(0.005):
            raise OSError("the test has ended")

    server = start_server(lambda connection, _: send_mjpeg(connection, itertools.count(), pause))
    source = camera(f"http://{server.address}/video", name="door")
    samples = []
    for sample in source.samples():
        samples.append(sample)
        if len(samples) == 3:
            source.close()
        while source.dropped < 5 * len(samples) and len(samples) < 3:
            closed.wait(0.005)
    closed.set()
    assert source.live
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert source.dropped >= 10
    assert all(after.timestamp_s > before.timestamp_s for before, after in itertools.pairwise(samples))


def test_stream_that_ends_is_reopened(
    start_server: Callable[[Serve], StreamServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_module, "REOPEN_FIRST_DELAY_S", 0.01)
    closed = threading.Event()

    def serve(connection: socket.socket, number: int) -> None:
        connection.sendall(video_bytes(30, container="mpegts", codec="mpeg2video"))
        if number > 1:
            closed.wait(WAIT_S)

    server = start_server(serve)
    source = camera(f"tcp://{server.address}", encoding="raw")
    numbers = []
    for sample in source.samples():
        assert sample.load_image is not None
        numbers.append(frame_number(sample.load_image()))
        if server.connections >= 2:
            closed.set()
            source.close()
    assert server.connections >= 2
    assert numbers


def test_close_ends_a_camera_that_waits_for_a_frame(
    start_server: Callable[[Serve], StreamServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_module, "READ_TIMEOUT_S", 0.5)
    sent_all, ended = threading.Event(), threading.Event()

    def serve(connection: socket.socket, _: int) -> None:
        send_mjpeg(connection, iter(range(20)), lambda _: None)
        sent_all.set()
        ended.wait(WAIT_S)

    server = start_server(serve)
    source = camera(f"http://{server.address}/video", name="ends")
    samples = source.samples()
    assert next(samples).index == 0
    sent_all.wait(WAIT_S)
    threading.Timer(0.05, source.close).start()
    list(samples)
    ended.set()
    assert not [thread for thread in threading.enumerate() if thread.name == "camera-ends"]


def test_unreachable_camera_raises_with_reason_and_without_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # free again once it is closed
    with pytest.raises(CameraUnavailable, match="refused") as caught:
        next(camera(f"rtsp://me:secret@127.0.0.1:{port}/live").samples())
    assert "secret" not in str(caught.value)
    assert f"127.0.0.1:{port}/live" in str(caught.value)


def test_missing_device_raises_with_its_number() -> None:
    with pytest.raises(CameraUnavailable, match="camera 97: No such file"):
        next(camera("97").samples())


def test_malformed_device_raises_usage_error() -> None:
    with raises_error(UsageError, "BadSetting", match="expected a number, a path such as /dev/video0, or a URL"):
        camera("webcam")
