from django.urls import path

from . import views

urlpatterns = [
    path("pictures/", views.upload),
    path("pictures/<uuid:id>/", views.show),
    path("callback/", views.callback),
]
