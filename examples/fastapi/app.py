"""FastAPI: submit, poll, and watch a job over server-sent events.

Beside `make up`, with the client installed (`pip install . fastapi uvicorn`):

    uvicorn --app-dir examples/fastapi app:api
    curl localhost:8000/captions --json '{"image": "https://..."}'    # 202 {"id": "..."}; 422 with what is wrong
    curl localhost:8000/captions/<id>                                 # {"status": "succeeded", "text": "A cat ..."}
    curl --no-buffer localhost:8000/captions/<id>/events              # event: starting, processing, succeeded

Errors of the client have one body everywhere: {"error": {"code": ..., "message": ..., "detail": ..., ...}}.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from idefics_jobs import Caption, Client, IdeficsError, JobCanceled, JobError
from pydantic import BaseModel, Field

#: Longest duration of a stream of events in seconds, since an id that does not exist stays `starting` for ever.
MAX_STREAM_S = 300
ENDS = ("succeeded", "failed", "canceled")

api = FastAPI()
client = Client(
    os.environ.get("BROKER_URL", "redis://localhost:6379/0"), result_backend=os.environ.get("RESULT_BACKEND")
)


class NewCaption(BaseModel, extra="forbid"):
    """The fields that visitors may set. If the body were a Caption, it would also accept `callback`, `num_beams`, and a
    path as its image."""

    #: http(s) or data:, which Caption checks. For a form's file use an UploadFile; FastAPI then needs python-multipart.
    image: str
    prompt: str | None = Field(default=None, max_length=500)


@api.exception_handler(IdeficsError)
async def refuse(request: Request, error: IdeficsError) -> JSONResponse:
    """Handles all errors of the client and of failed jobs: 4xx if the caller can correct them, 503 if temporary."""
    status, body = error.response()
    return JSONResponse(body, status)


@api.post("/captions", status_code=202)
async def create(asked: NewCaption) -> dict[str, str]:
    job = await client.asubmit(Caption(image=asked.image, prompt=asked.prompt))
    return {"id": job.id}


@api.get("/captions/{id}")
async def read(id: str) -> dict[str, str | None]:
    status = await client.astatus(id)
    # Raises the job's error.
    text = (await client.aresult(id)).text.strip() if status in ENDS else None
    return {"status": status, "text": text}


@api.delete("/captions/{id}", status_code=204)
async def cancel(id: str) -> None:
    await client.acancel(id)


@api.get("/captions/{id}/events")
async def watch(id: str) -> StreamingResponse:
    return StreamingResponse(events(id), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def events(id: str) -> AsyncIterator[str]:
    """An event for each change: the number of jobs that wait in the queue, and finally the text or the error."""
    told, end = "", time.monotonic() + MAX_STREAM_S
    try:
        while time.monotonic() < end:
            status, data = await progress(id)
            if told != (told := event(status, data)):
                yield told
            if status in ENDS:
                return
            await asyncio.sleep(0.1)
    except IdeficsError as error:
        # The response has begun with 200, and its status cannot change any more.
        yield event("error", error.response()[1])


async def progress(id: str) -> tuple[str, Mapping[str, object]]:
    status = await client.astatus(id)
    if status not in ENDS:
        return status, {"queued": await client.aqueued()}
    try:
        return status, {"text": (await client.aresult(id)).text.strip()}
    except (JobError, JobCanceled) as error:
        return status, error.response()[1]


def event(name: str, data: Mapping[str, object]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
