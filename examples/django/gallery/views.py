import json

from django.conf import settings
from django.http import Http404, HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_GET, require_POST
from idefics_jobs import Callback, Caption, Client, IdeficsError, server_sent_event
from idefics_jobs.webhooks import InvalidWebhook, verify

from .celery import app
from .models import Picture
from .tasks import save_error, save_text

# In development, callbacks go to this machine over http, which the client refuses by default.
client = Client(app=app, check_callbacks=not settings.DEBUG)
CALLBACK = Callback(url=settings.CALLBACK_URL, key_id="main") if settings.CALLBACK_URL else None


@csrf_exempt  # for programs; a form on a page of yours sends its token
@require_POST
def upload(request):
    file = request.FILES.get("picture")
    if file is None:
        return JsonResponse({"error": {"message": "Send a file in the field `picture`."}}, status=400)
    picture = Picture(name=file.name)
    try:
        caption = Caption(image=file, callback=CALLBACK, stream=True)
        # Saved before the job is sent, since the text may come before `submit` returns.
        picture.save()
        submit(caption, str(picture.pk))
    except IdeficsError as error:
        Picture.objects.filter(pk=picture.pk).delete()
        status, body = error.response()
        return JsonResponse(body, status=status)
    return JsonResponse(shown(picture), status=202)


def submit(caption, id):
    links = {} if CALLBACK else {"link": save_text.s(id), "link_error": save_error.s()}
    client.submit(caption, task_id=id, **links)


@require_GET
def show(request, id):
    return JsonResponse(shown(get_object_or_404(Picture, pk=id)))


@require_GET
def watch(request, id):
    """The text while it is written, as server-sent events."""
    return StreamingHttpResponse(events(str(get_object_or_404(Picture, pk=id).pk)), content_type="text/event-stream")


def events(id):
    try:
        yield from map(server_sent_event, client.job(id).watch(timeout=300))
    except IdeficsError as error:
        # The response has begun with 200, and its status cannot change any more.
        yield f"event: error\ndata: {json.dumps(error.response()[1])}\n\n"


@csrf_exempt  # the signature says who sent it
@require_POST
def callback(request):
    """Receives jobs' outcomes. An event may arrive more than once, so the second time must leave the row unchanged."""
    if not settings.CALLBACK_SECRET:
        raise Http404
    try:
        event = verify(settings.CALLBACK_SECRET, request.headers, request.body)
    except InvalidWebhook:
        return HttpResponse(status=401)
    for one in event.events:
        picture = Picture.objects.filter(pk=one.data.id).first()
        if picture is None:
            continue
        if one.type == "job.succeeded":
            picture.done(one.data.result.text)
        else:
            picture.failed(one.data.error.response()[1]["error"]["message"] if one.data.error else one.type)
    return HttpResponse(status=204)


def shown(picture):
    return {"id": str(picture.pk), "name": picture.name, "state": picture.state, "text": picture.text}
