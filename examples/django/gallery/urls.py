from django.urls import path

from . import views

urlpatterns = [
    path("pictures/", views.upload),
    path("pictures/<uuid:id>/", views.show),
    path("pictures/<uuid:id>/events/", views.watch),
    path("callback/", views.callback),
]
