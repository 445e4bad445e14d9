"""A payment provider that somebody else wrote: signs one delivery with PyPI's standardwebhooks, posts it, and prints
the status of the answer.

stdin: {"url", "id", "secrets", "age_seconds", "signed", "sent"}; `signed` and `sent` are bodies, the same unless
somebody changed it on the way.
"""

import json
import sys
from datetime import datetime, timedelta, timezone
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from standardwebhooks import Webhook

delivery = json.load(sys.stdin)
at = datetime.now(timezone.utc) - timedelta(seconds=delivery["age_seconds"])
headers = {
    "content-type": "application/json",
    "webhook-id": delivery["id"],
    "webhook-timestamp": str(int(at.timestamp())),
    "webhook-signature": " ".join(
        Webhook(secret).sign(delivery["id"], at, delivery["signed"]) for secret in delivery["secrets"]
    ),
}
request = Request(delivery["url"], delivery["sent"].encode(), headers, method="POST")
try:
    with build_opener(ProxyHandler({})).open(request, timeout=15) as answer:
        print(answer.status)
except HTTPError as refused:
    print(refused.code)
