"""A loopback Amazon S3: the part of the REST API that s3fs uses. Signatures are not looked at."""

import base64
import hashlib
import urllib.parse
import xml.etree.ElementTree as xml
from xml.sax.saxutils import escape

from fake_store import Handler, Stored

TIME = "2026-01-01T00:00:00.000Z"


class S3(Handler):
    def send(self, text: str, code: int = 200, **headers: str) -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
        self.answer(code, body, "application/xml", **headers)

    def error(self, code: int, name: str, message: str = "") -> None:
        self.send(f"<Error><Code>{name}</Code><Message>{message}</Message></Error>", code)

    def refuse(self) -> None:
        self.error(403, "AccessDenied", "Access Denied")

    def target(self) -> tuple[str, str]:
        path = urllib.parse.unquote("/".join(self.parts))
        bucket, _, name = path.partition("/")
        return bucket, name

    def headers_of(self, found: Stored) -> dict[str, str]:
        return {
            "ETag": f'"{found.md5.hex()}"',
            "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "Accept_Ranges": "bytes",
        }

    def do_PUT(self) -> None:
        if not self.begin():
            return None
        bucket, name = self.target()
        self.store.counts["write"] += 1
        data = self._content()
        if "uploadId" in self.query:
            parts = self.store.uploads[self.query["uploadId"]][1]
            parts[int(self.query["partNumber"])] = data
            return self.answer(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')
        expected = 0 if self.headers.get("If-None-Match") == "*" else None
        if not self.store.put(bucket, name, data, expected):
            return self.error(412, "PreconditionFailed", "At least one did not hold")
        self.answer(200, **self.headers_of(self.store.get(bucket, name)))

    def _content(self) -> bytes:
        """The body, without the chunks of `aws-chunked`."""
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return self.body
        out, rest = b"", self.body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size.split(b";")[0], 16)
            if not length:
                break
            out, rest = out + rest[:length], rest[length + 2 :]
        return out

    def do_HEAD(self) -> None:
        if not self.begin():
            return
        bucket, name = self.target()
        found = self.store.get(bucket, name)
        if not name:
            self.answer(200)
        elif found is None:
            self.answer(404)
        else:
            self.answer(200, Content_Length=str(len(found.data)), **self.headers_of(found))

    def do_GET(self) -> None:
        if not self.begin():
            return None
        bucket, name = self.target()
        if not name:
            return self._list(bucket)
        self.store.counts["read"] += 1
        found = self.store.get(bucket, name)
        if found is None:
            return self.error(404, "NoSuchKey", "The specified key does not exist.")
        code, data, headers = self.range_of(found.data)
        self.answer(code, data, **headers, **self.headers_of(found))

    def _list(self, bucket: str) -> None:
        self.store.counts["list"] += 1
        q = self.query
        start = base64.b64decode(q.get("continuation-token", "")).decode()
        prefix, delimiter = q.get("prefix", ""), q.get("delimiter", "")
        most = int(q.get("max-keys", 1000))
        names, folders, after = self.store.listing(bucket, prefix, delimiter, start, most)
        url = q.get("encoding-type") == "url"
        shown = urllib.parse.quote if url else escape
        text = ""
        for name in names:
            if found := self.store.get(bucket, name):
                text += f"<Contents><Key>{shown(name)}</Key><LastModified>{TIME}</LastModified>"
                text += f"<ETag>&quot;{found.md5.hex()}&quot;</ETag>"
                text += f"<Size>{len(found.data)}</Size></Contents>"
        for folder in folders:
            text += f"<CommonPrefixes><Prefix>{shown(folder)}</Prefix></CommonPrefixes>"
        if after:
            token = base64.b64encode(after.encode()).decode()
            text += f"<NextContinuationToken>{token}</NextContinuationToken>"
        head = f"<Name>{bucket}</Name><Prefix>{shown(prefix)}</Prefix>"
        head += f"<KeyCount>{len(names) + len(folders)}</KeyCount><MaxKeys>{most}</MaxKeys>"
        head += "<EncodingType>url</EncodingType>" if url else ""
        head += f"<IsTruncated>{'true' if after else 'false'}</IsTruncated>"
        self.send(f"<ListBucketResult>{head}{text}</ListBucketResult>")

    def do_DELETE(self) -> None:
        if self.begin():
            self.store.delete(*self.target())
            self.answer(204)

    def do_POST(self) -> None:
        if not self.begin():
            return None
        bucket, name = self.target()
        if "delete" in self.query:
            keys = [e.text for e in xml.fromstring(self.body).iter() if e.tag.endswith("Key")]
            for key in keys:
                self.store.delete(bucket, key)
            done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            return self.send(f"<DeleteResult>{done}</DeleteResult>")
        if "uploads" in self.query:
            number = str(len(self.store.uploads))
            self.store.uploads[number] = (name, {})
            text = (
                f"<Bucket>{bucket}</Bucket><Key>{escape(name)}</Key><UploadId>{number}</UploadId>"
            )
            return self.send(
                f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>"
            )
        parts = self.store.uploads[self.query["uploadId"]][1]
        data = b"".join(parts[number] for number in sorted(parts))
        expected = 0 if self.headers.get("If-None-Match") == "*" else None
        if not self.store.put(bucket, name, data, expected):
            return self.error(412, "PreconditionFailed", "At least one did not hold")
        self.send(
            f"<CompleteMultipartUploadResult><Key>{escape(name)}</Key></CompleteMultipartUploadResult>"
        )
