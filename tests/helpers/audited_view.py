"""Run `movekd view` and log what it looks up, connects to, opens and starts.

    python audited_view.py LOG gate|no-gate OPTION...

LOG.routes has path and methods of each route, and the number of functions. LOG has one line of JSON
per event, from the moment that the page can be opened. ``no-gate`` takes the gate away: LOG must
then show what the gate prevents.
"""

import json
import os
import sys
import threading

WATCHED = (
    *("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.bind"),
    *("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "urllib.Request"),
)


def write_routes(page, path: str) -> None:
    found: dict[str, list[str]] = {}
    for route in page.app.routes:
        router = getattr(route, "original_router", None)
        for each in [route] if router is None else router.routes:
            found[each.path] = sorted({*found.get(each.path, []), *each.methods})
    with open(path, "w") as file:
        json.dump({"routes": found, "functions": len(page.fns)}, file)


def main() -> None:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    here, is_armed = threading.local(), False

    def record(event: str, args: tuple[object, ...]) -> None:
        if not is_armed or event not in WATCHED or getattr(here, "is_busy", False):
            return
        here.is_busy = True
        try:
            said = [str(arg) for arg in args]
            if event.startswith(("open", "os.")) and isinstance(args[0], str):
                said[0] = os.path.abspath(args[0])
            os.write(log, (json.dumps([event, said]) + "\n").encode())
        finally:
            here.is_busy = False

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # as the command does, before the import
    from movekd.cli.main import main as movekd
    from movekd.view import gate, gradio_app

    if sys.argv[2] == "no-gate":

        async def hand_on(self, scope, receive, send):
            await self._app(scope, receive, send)

        gate.Gate.__call__ = hand_on
    serve = gradio_app.serve

    def audited_serve(page, host, port, on_start):
        def start():
            nonlocal is_armed
            write_routes(page, routes)
            is_armed = True
            on_start()

        serve(page, host, port, start)

    gradio_app.serve, routes = audited_serve, f"{sys.argv[1]}.routes"
    sys.addaudithook(record)
    sys.argv[1:] = ["view", *sys.argv[3:]]
    movekd()


if __name__ == "__main__":
    main()
