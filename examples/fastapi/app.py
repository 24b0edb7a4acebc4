"""FastAPI: submit, poll, and watch a job over server-sent events.

Beside `make up`, with the client installed (`pip install . fastapi uvicorn`):

    uvicorn --app-dir examples/fastapi app:api
    curl localhost:8000/captions --json '{"image": "https://..."}'    # 202 {"id": "..."}; 422 with what is wrong
    curl localhost:8000/captions/<id>                                 # {"status": "succeeded", "text": "A cat ..."}
    curl --no-buffer localhost:8000/captions/<id>/events              # event: starting, processing, succeeded
"""

import asyncio
import json
import os
import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from idefics_jobs import Caption, Client, IdeficsError

#: Seconds that one stream of events lasts at most: an id that does not exist is `starting` for ever.
MAX_STREAM_S = 300

api = FastAPI()
client = Client(
    os.environ.get("BROKER_URL", "redis://localhost:6379/0"), result_backend=os.environ.get("RESULT_BACKEND")
)


@api.exception_handler(IdeficsError)
async def refuse(request: Request, error: IdeficsError) -> JSONResponse:
    """Every error of the client, a failed job's too: 4xx where the caller can mend it, 503 where it may pass."""
    status, body = error.response()
    return JSONResponse(body, status)


@api.post("/captions", status_code=202)
async def create(caption: Caption) -> dict[str, str]:
    """The body is a caption's fields, checked by the same class as everywhere: FastAPI answers 422 for a wrong one."""
    job = await client.asubmit(caption)
    return {"id": job.id}


@api.get("/captions/{id}")
async def read(id: str) -> dict[str, str | None]:
    status = await client.astatus(id)
    # Raises what the job failed with.
    text = (await client.aresult(id)).text.strip() if status in ENDS else None
    return {"status": status, "text": text}


@api.delete("/captions/{id}", status_code=204)
async def cancel(id: str) -> None:
    await client.acancel(id)


@api.get("/captions/{id}/events")
async def watch(id: str) -> StreamingResponse:
    return StreamingResponse(events(id), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


ENDS = ("succeeded", "failed", "canceled")


async def events(id: str):
    """An event for each change: how many jobs wait in the queue, or at the end the text or the error."""
    told, end = None, time.monotonic() + MAX_STREAM_S
    while time.monotonic() < end:
        status = await client.astatus(id)
        data = await ending(id) if status in ENDS else {"queued": await client.aqueued()}
        if (status, data) != told:
            told = status, data
            yield f"event: {status}\ndata: {json.dumps(data)}\n\n"
        if status in ENDS:
            return
        await asyncio.sleep(0.1)


async def ending(id: str):
    try:
        return {"text": (await client.aresult(id)).text.strip()}
    except IdeficsError as error:
        return error.as_dict()
