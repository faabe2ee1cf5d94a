"""A loopback Google Cloud Storage: the part of the JSON API that gcsfs and tensorstore use."""

import base64
import email.parser
import json
import urllib.parse

import google_crc32c
from fake_store import Handler, Stored


class GCS(Handler):
    def send(self, value: dict, code: int = 200, **headers: str) -> None:
        self.answer(code, json.dumps(value).encode(), "application/json", **headers)

    def error(self, code: int, reason: str, message: str) -> None:
        inner = {"code": code, "message": message, "errors": [{"reason": reason}]}
        self.send({"error": inner}, code)

    def refuse(self) -> None:
        message = "Anonymous caller does not have storage.objects.list access to the bucket."
        self.error(401, "required", message)

    def about(self, bucket: str, name: str, found: Stored) -> dict:
        crc = google_crc32c.value(found.data).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "size": str(len(found.data)),
            "generation": str(found.generation),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "md5Hash": base64.b64encode(found.md5).decode(),
            "crc32c": base64.b64encode(crc).decode(),
            "etag": str(found.generation),
        }

    def save(self, bucket: str, name: str, data: bytes, query: dict) -> None:
        self.store.counts["write"] += 1
        expected = query.get("ifGenerationMatch")
        if not self.store.put(bucket, name, data, None if expected is None else int(expected)):
            return self.error(412, "conditionNotMet", "A precondition did not hold.")
        self.send(self.about(bucket, name, self.store.get(bucket, name)))

    def do_POST(self) -> None:
        if not self.begin():
            return None
        if self.parts[0] == "batch":
            return self._batch()
        if self.parts[0] == "resume":
            return self._resume()
        if self.parts[0] != "upload":  # a new bucket
            return self.send({"name": json.loads(self.body)["name"]})
        bucket, kind = urllib.parse.unquote(self.parts[4]), self.query["uploadType"]
        if kind == "multipart":
            head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
            about, data = email.parser.BytesParser().parsebytes(head + self.body).get_payload()
            name = json.loads(about.get_payload(decode=True))["name"]
            return self.save(bucket, name, data.get_payload(decode=True), self.query)
        if kind == "resumable":
            name = self.query.get("name") or json.loads(self.body)["name"]
            number = str(len(self.store.uploads))
            self.store.uploads[number] = (bucket, name, self.query, bytearray())
            return self.send({}, Location=f"http://{self.headers['Host']}/resume/{number}?x=1")
        return self.save(bucket, self.query["name"], self.body, self.query)

    def do_PUT(self) -> None:
        if self.begin():
            self._resume()

    def _resume(self) -> None:
        """One part of a resumable upload; the last one says how long the whole is."""
        bucket, name, query, whole = self.store.uploads[self.parts[1]]
        whole += self.body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(whole) - 1}")
        self.save(bucket, name, bytes(whole), query)

    def do_GET(self) -> None:
        if not self.begin():
            return None
        parts = [urllib.parse.unquote(part) for part in self.parts]
        if parts[0] == "download":
            parts, self.query["alt"] = parts[1:], "media"
        bucket = parts[3]
        if len(parts) == 4:
            return self.send({"name": bucket, "location": "US", "storageClass": "STANDARD"})
        if len(parts) == 5:
            return self._list(bucket)
        self.store.counts["read"] += 1
        found = self.store.get(bucket, parts[5])
        if found is None:
            return self.error(404, "notFound", "No such object")
        if self.query.get("alt") != "media":
            return self.send(self.about(bucket, parts[5], found))
        known = self.query.get("ifGenerationNotMatch")
        if known is not None and int(known) == found.generation:
            return self.answer(304)
        code, data, headers = self.range_of(found.data)
        headers["x-goog-generation"] = str(found.generation)
        headers["x-goog-stored-content-length"] = str(len(found.data))
        self.answer(code, data, **headers)

    def _list(self, bucket: str) -> None:
        self.store.counts["list"] += 1
        most, q = int(self.query.get("maxResults", 10**9)), self.query
        start = base64.b64decode(q.get("pageToken", "")).decode()
        prefix, delimiter = q.get("prefix", ""), q.get("delimiter", "")
        names, folders, after = self.store.listing(bucket, prefix, delimiter, start, most)
        found = [(name, self.store.get(bucket, name)) for name in names]
        items = [self.about(bucket, name, item) for name, item in found if item]
        out = {"kind": "storage#objects", "items": items, "prefixes": folders}
        more = {"nextPageToken": base64.b64encode(after.encode()).decode()} if after else {}
        self.send(out | more)

    def do_DELETE(self) -> None:
        if not self.begin():
            return
        if self.store.delete(*(urllib.parse.unquote(self.parts[i]) for i in (3, 5))):
            self.answer(204)
        else:
            self.error(404, "notFound", "No such object")

    def _batch(self) -> None:
        """Deletions bundled in one multipart request."""
        head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
        answers = []
        for part in email.parser.BytesParser().parsebytes(head + self.body).get_payload():
            path = part.get_payload().split()[1].split("/")
            self.store.delete(*(urllib.parse.unquote(path[i]) for i in (4, 6)))
            answers.append("Content-Type: application/http\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")
        text = "".join(f"--b\r\n{answer}\r\n" for answer in answers) + "--b--\r\n"
        self.answer(200, text.encode(), "multipart/mixed; boundary=b")
