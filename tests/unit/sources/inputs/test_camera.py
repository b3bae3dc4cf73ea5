"""Cameras: real streams over real sockets, cut off and come back; always the newest frame."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sources.errors import BadSetting, CameraUnavailable
from sources.inputs.camera import Camera
from tests.support.environment.clips import frame_number, image_bytes, video_bytes

Serve = Callable[[socket.socket, int], None]


class StreamServer:
    """Accepts connections on a free port, one after another, and has `serve(connection, number)` talk."""

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
                    continue  # the camera hung up

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def serving() -> Iterator[Callable[[Serve], StreamServer]]:
    servers: list[StreamServer] = []

    def start(serve: Serve) -> StreamServer:
        servers.append(StreamServer(serve))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def _mjpeg(connection: socket.socket, frames: Iterator[int], pause_s: float) -> None:
    """MJPEG over HTTP, as network cameras send it."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=frame\r\n\r\n")
    for index in frames:
        jpeg = image_bytes("JPEG", index % 30)
        connection.sendall(
            b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg) + jpeg + b"\r\n"
        )
        time.sleep(pause_s)


def test_a_slow_consumer_gets_the_newest_frame_and_the_others_count_as_dropped(
    serving: Callable[[Serve], StreamServer],
) -> None:
    server = serving(lambda connection, _: _mjpeg(connection, itertools.count(), 0.01))
    camera = Camera(f"http://{server.address}/video", name="door", limit=5)
    samples = []
    for sample in camera.samples():
        samples.append(sample)
        time.sleep(0.1)
    assert camera.live
    assert [sample.index for sample in samples] == list(range(5))
    assert camera.dropped >= 10
    ages_s = [after.timestamp_s - before.timestamp_s for before, after in itertools.pairwise(samples)]
    assert min(ages_s) > 0.05  # each is of its own time: nothing queued up behind the slow consumer


def test_a_stream_that_ends_is_opened_again(serving: Callable[[Serve], StreamServer]) -> None:
    def serve(connection: socket.socket, number: int) -> None:
        connection.sendall(video_bytes(30, container="mpegts", codec="mpeg2video"))
        if number == 1:
            time.sleep(0.2)  # then the connection breaks
        else:
            time.sleep(2)

    server = serving(serve)
    camera = Camera(f"tcp://{server.address}", encoding="raw")
    taken = []
    for sample in camera.samples():
        assert sample.load_image is not None
        taken.append(frame_number(sample.load_image()))
        if server.connections >= 2:
            camera.close()
    assert server.connections >= 2
    assert taken


def test_closing_ends_a_camera_that_waits_for_a_frame_and_its_thread(serving: Callable[[Serve], StreamServer]) -> None:
    server = serving(lambda connection, _: _mjpeg(connection, iter(range(60)), 0.02))
    camera = Camera(f"http://{server.address}/video", name="ends")
    threading.Timer(0.5, camera.close).start()
    assert [sample.index for sample in camera.samples()]
    assert not [thread for thread in threading.enumerate() if thread.name == "camera-ends"]


def test_a_camera_that_does_not_answer_says_why_and_hides_the_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # closed again below: nobody listens there
    with pytest.raises(CameraUnavailable, match="refused") as caught:
        next(Camera(f"rtsp://me:secret@127.0.0.1:{port}/live").samples())
    assert "secret" not in str(caught.value)
    assert f"127.0.0.1:{port}/live" in str(caught.value)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(CameraUnavailable, match="camera 97: No such file"):
        next(Camera(97).samples())


def test_a_device_that_is_neither_number_nor_path_nor_address_is_refused() -> None:
    with pytest.raises(BadSetting, match="expected a number, a path such as /dev/video0, or an address"):
        Camera("webcam")
