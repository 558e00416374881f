"""A fake W&B server, sufficient for real `wandb` clients that find it through WANDB_BASE_URL.

    python wandb_server.py HOST PORT_FILE

It knows sweeps (grid, random), agents, runs (create, resume, finish, stop), histories and files.
GET /state returns its whole state, POST /stop/RUN asks a run to end.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
import os
import random
import re
import secrets
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

ENTITY = "tester"
lock = threading.RLock()
sweeps: dict[str, dict[str, Any]] = {}
agents: dict[str, str] = {}
"""Agent -> its sweep."""
runs: dict[str, dict[str, Any]] = {}
files: dict[str, int] = {}
"""Path -> bytes."""


def identity(*parts: str) -> str:
    return base64.b64encode(":".join(parts).encode()).decode()


def project(name: str | None, entity: str | None) -> dict[str, Any]:
    name, entity = name or "uncategorized", entity or ENTITY
    whose = {"id": identity("Entity", entity), "name": entity}
    return {"id": identity("Project", name, entity), "name": name, "entity": whose}


# --- sweeps and agents


def draw(parameter: dict[str, Any], generator: random.Random) -> Any:
    if "value" in parameter or "values" in parameter:
        return generator.choice(choices(parameter))
    low, high = parameter["min"], parameter["max"]
    if parameter.get("distribution") == "log_uniform_values":
        return math.exp(generator.uniform(math.log(low), math.log(high)))
    return generator.uniform(low, high)


def choices(parameter: dict[str, Any]) -> list[Any]:
    return parameter["values"] if "values" in parameter else [parameter["value"]]


def next_trial(sweep: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of the sweep's next run; None when there are no more."""
    config, number = sweep["settings"], sweep["launched"]
    if number >= config.get("run_cap", math.inf):
        return None
    names = sorted(config["parameters"])
    parameters = [config["parameters"][name] for name in names]
    if config["method"] == "grid":
        grid = itertools.product(*map(choices, parameters))
        values = next(itertools.islice(grid, number, number + 1), None)
        if values is None:
            return None
    else:
        generator = random.Random(f"{sweep['name']} {number}")
        values = tuple(draw(parameter, generator) for parameter in parameters)
    return {name: {"value": value} for name, value in zip(names, values, strict=True)}


def upsert_sweep(asked: dict[str, Any]) -> dict[str, Any]:
    sweep = next((sweep for sweep in sweeps.values() if sweep["id"] == asked.get("id")), None)
    if sweep is None:
        name = secrets.token_hex(4)
        entity, project_name = asked.get("entityName") or ENTITY, asked.get("projectName") or "uncategorized"
        sweep = sweeps[name] = {
            "id": identity("Sweep", name, project_name, entity),
            "name": name,
            "entity": entity,
            "project": project_name,
            "state": "RUNNING",
            "launched": 0,
        }
    if asked.get("config"):
        sweep["config"], sweep["settings"] = asked["config"], yaml.safe_load(asked["config"])
    sweep["state"] = asked.get("state") or sweep["state"]
    reply = {"name": sweep["name"], "project": project(sweep["project"], sweep["entity"])}
    return {"upsertSweep": {"sweep": reply, "configValidationWarnings": []}}


def query_sweep(asked: dict[str, Any]) -> dict[str, Any]:
    sweep = sweeps.get(asked["sweep"])
    if sweep is None:
        return {"project": {"sweep": None}}
    unset = (
        "description",
        "heartbeatAt",
        "updatedAt",
        "bestLoss",
        "controller",
        "scheduler",
        "controllerRunName",
    )
    reply = {key: sweep[key] for key in ("id", "name", "state", "config")} | dict.fromkeys(unset)
    reply |= {"method": sweep["settings"]["method"], "displayName": sweep["name"], "runs": {"edges": []}}
    return {"project": {"sweep": reply | {"createdAt": "2026-01-01T00:00:00", "earlyStopJobRunning": False}}}


def create_agent(asked: dict[str, Any]) -> dict[str, Any]:
    agent = identity("Agent", str(len(agents)))
    agents[agent] = asked["sweep"]
    return {"createAgent": {"agent": {"id": agent}}}


def heartbeat(asked: dict[str, Any]) -> dict[str, Any]:
    sweep = sweeps[agents[asked["id"]]]
    running = json.loads(asked["runState"] or "{}")
    commands: list[dict[str, Any]] = [
        {"type": "stop", "run_id": run} for run in running if run in runs and runs[run]["stop"]
    ]
    if sweep["state"] == "CANCELED":
        commands = [{"type": "exit"}]
    elif not running and sweep["state"] == "RUNNING" and (arguments := next_trial(sweep)) is not None:
        name = f"{sweep['name']}-{sweep['launched']}"
        sweep["launched"] += 1
        runs[name] = new_run(name, sweep["entity"], sweep["project"]) | {
            "sweep": sweep["name"],
            "state": "pending",
            "args": {key: value["value"] for key, value in arguments.items()},
        }
        commands.append({"type": "run", "run_id": name, "program": None, "args": arguments})
    elif not running:
        sweep["state"] = "FINISHED"
        commands = [{"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": asked["id"]}, "commands": json.dumps(commands)}}


# --- runs


def new_run(name: str, entity: str, project_name: str) -> dict[str, Any]:
    return {
        "id": identity("Run", name, project_name, entity),
        "name": name,
        "entity": entity,
        "project": project_name,
        "sweep": None,
        "state": "running",
        "config": {},
        "history": [],
        "summary": {},
        "log": [],
        "exitcode": None,
        "starts": 0,
        "stop": False,
    }


def upsert_run(asked: dict[str, Any]) -> dict[str, Any]:
    name = asked.get("name") or next(run["name"] for run in runs.values() if run["id"] == asked["id"])
    created = name not in runs or runs[name]["state"] == "pending"
    where = asked.get("entity") or ENTITY, asked.get("project") or "uncategorized"
    run = runs.setdefault(name, new_run(name, *where))
    run["starts"] += 1
    run["state"] = "running"
    run["sweep"] = asked.get("sweep") or run["sweep"]
    for key, variable in (("config", "config"), ("summary", "summaryMetrics")):
        if asked.get(variable):
            run[key] = json.loads(asked[variable])
    bucket = {
        "id": run["id"],
        "name": name,
        "displayName": asked.get("displayName") or name,
        "description": None,
        "config": json.dumps(run["config"]),
        "sweepName": run["sweep"],
        "historyLineCount": len(run["history"]),
        "project": project(run["project"], run["entity"]),
    }
    return {"upsertBucket": {"inserted": created, "bucket": bucket}}


def resume_status(asked: dict[str, Any]) -> dict[str, Any]:
    run, bucket = runs.get(asked["name"]), None
    if run is not None and run["state"] != "pending":
        bucket = {
            "id": run["id"],
            "name": run["name"],
            "displayName": run["name"],
            "summaryMetrics": json.dumps(run["summary"]),
            "logLineCount": len(run["log"]),
            "historyLineCount": len(run["history"]),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
            "eventsTail": "[]",
            "config": json.dumps(run["config"]),
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }
    return {"model": {**project(asked.get("project"), asked.get("entity")), "bucket": bucket}}


def stream(run: dict[str, Any], sent: dict[str, Any]) -> dict[str, Any]:
    """A piece of a run's histories and logs, and how it ended."""
    for name, piece in (sent.get("files") or {}).items():
        offset, lines = piece.get("offset", 0), piece.get("content") or []
        if name == "wandb-history.jsonl":
            run["history"][offset:] = [json.loads(line) for line in lines]
        elif name == "wandb-summary.json":
            run["summary"] = json.loads(lines[-1])
        elif name == "output.log":
            run["log"][offset : offset + len(lines)] = lines
    if sent.get("exitcode") is not None:
        run["exitcode"] = sent["exitcode"]
        run["state"] = "finished" if sent["exitcode"] == 0 else "crashed"
    return {"limits": {}, **({"stopped": True} if run["stop"] else {})}


def create_files(asked: dict[str, Any]) -> dict[str, Any]:
    folder = f"{Handler.address}/storage/{asked['entity']}/{asked['project']}/{asked['run']}"
    listed = [{"name": name, "uploadUrl": f"{folder}/{name}"} for name in asked["files"]]
    return {"createRunFiles": {"runID": identity(asked["run"]), "uploadHeaders": [], "files": listed}}


VIEWER = {
    **dict.fromkeys(("entity", "username", "name"), ENTITY),
    "id": identity("User", ENTITY),
    "email": "tester@example.invalid",
    "flags": "{}",
    "admin": False,
    "teams": {"edges": [{"node": {"name": ENTITY}}]},
    "apiKeys": {"edges": []},
    "deletedAt": None,
}
OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "UpsertSweep": upsert_sweep,
    "SweepWithRuns": query_sweep,
    "SweepConfig": query_sweep,
    "GetSweepState": query_sweep,
    "CreateAgent": create_agent,
    "Heartbeat": heartbeat,
    "UpsertBucket": upsert_run,
    "RunResumeStatus": resume_status,
    "CreateRunFiles": create_files,
    "MarkRunFilesUploaded": lambda asked: {"markRunFilesUploaded": {"success": True}},
    "Viewer": lambda asked: {"viewer": VIEWER},
    "GetViewer": lambda asked: {"viewer": VIEWER},
    "GetDefaultEntity": lambda asked: {"viewer": VIEWER},
    "ServerFeaturesQuery": lambda asked: {"serverInfo": {"features": []}},
}


def graphql(query: dict[str, Any]) -> dict[str, Any]:
    found = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
    name = query.get("operationName") or (found[1] if found else "")
    if name not in OPERATIONS:
        return {"errors": [{"message": f"the fake server does not know the operation {name}"}], "data": None}
    return {"data": OPERATIONS[name](query.get("variables") or {})}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    address = ""

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with lock:
            status, reply = self.judge(self.path.split("?")[0], body)
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def judge(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/state":
            return 200, {"sweeps": sweeps, "agents": agents, "runs": runs, "files": files}
        if stopped := re.fullmatch(r"/stop/(.+)", path):
            runs[stopped[1]]["stop"] = True
            return 200, {}
        if path == "/graphql":
            return 200, graphql(json.loads(body))
        if named := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            return 200, stream(runs[named[1]], json.loads(body or b"{}"))
        if self.command == "PUT" and path.startswith("/storage/"):
            files[path.removeprefix("/storage/")] = len(body)
            return 200, {}
        return 404, {"error": "not found"}

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # A test starts many clients at once.
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients drop idle connections, and die in the tests.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    host, port_file = sys.argv[1], Path(sys.argv[2])
    server = Server((host, 0), Handler)
    Handler.address = f"http://{host}:{server.server_port}"
    temporary = port_file.with_suffix(".tmp")
    temporary.write_text(str(server.server_port))
    os.replace(temporary, port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
