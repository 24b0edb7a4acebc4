"""FastAPI: submit, poll, and watch a job's text as it is written, over server-sent events.

Beside `make up`, with the client installed (`pip install . fastapi uvicorn`):

    uvicorn --app-dir examples/fastapi app:api
    curl localhost:8000/captions --json '{"image": "https://..."}'    # 202 {"id": "..."}; 422 with what is wrong
    curl localhost:8000/captions/<id>                                 # {"status": "succeeded", "text": "A cat ..."}
    curl --no-buffer localhost:8000/captions/<id>/events              # event: stage, text, text ... end

Errors of the client have one body everywhere: {"error": {"code": ..., "message": ..., "detail": ..., ...}}.
"""

import json
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from idefics_jobs import Caption, Client, IdeficsError, server_sent_event
from pydantic import BaseModel, Field

#: Longest duration of a stream of events in seconds, since an id that does not exist stays `queued` for ever.
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
    job = await client.asubmit(Caption(image=asked.image, prompt=asked.prompt, stream=True))
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
    # 503 if Redis is away; a watch that has begun waits for it.
    await client.astatus(id)
    return StreamingResponse(events(id), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def events(id: str) -> AsyncIterator[str]:
    """An event for each update: its place in the queue, its stage, the text while it is written, the end."""
    try:
        async for update in client.job(id).awatch(MAX_STREAM_S):
            yield server_sent_event(update)
    except IdeficsError as error:
        # The response has begun with 200, and its status cannot change any more.
        yield f"event: error\ndata: {json.dumps(error.response()[1])}\n\n"
