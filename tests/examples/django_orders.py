"""A Django project in one file: places an order, and says so, in one transaction; its migrations make the outbox.

python -m examples.django_orders
"""

import os
import sys

import django
from django.conf import settings
from django.core.management import call_command

if not settings.configured:
    settings.configure(
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": os.environ["PGDATABASE"],
                "HOST": os.environ["PGHOST"],
                "PORT": os.environ["PGPORT"],
                "USER": os.environ["PGUSER"],
                "PASSWORD": os.environ.get("PGPASSWORD", ""),
            }
        },
        INSTALLED_APPS=["cdc_outbox.outbox.django"],
    )
    django.setup()

from django.db import connection, transaction

from cdc_outbox.outbox.django import Event, Outbox

outbox = Outbox()


def place_order(customer: str, total: int) -> int:
    with transaction.atomic():
        with connection.cursor() as cursor:  # a model's save() in a larger project
            cursor.execute("INSERT INTO orders (customer, total) VALUES (%s, %s) RETURNING id", [customer, total])
            order_id = int(cursor.fetchone()[0])
        placed = {"order": order_id, "customer": customer, "total": total}
        outbox.emit(Event("order.placed", str(order_id), placed, aggregate_type="order"))
    return order_id


if __name__ == "__main__":
    call_command("migrate", verbosity=0)
    print(place_order("Ada", 620), file=sys.stdout)
