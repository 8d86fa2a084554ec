package main

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"sync"
	"time"
)

const tailStep = 100 * time.Millisecond

type failure struct {
	Name      string   `json:"ename"`
	Value     string   `json:"evalue"`
	Traceback []string `json:"traceback"`
}

type event struct {
	Type          string   `json:"type"`
	Text          string   `json:"text,omitempty"`
	ExecutionTime int64    `json:"execution_time,omitempty"` // milliseconds
	Timestamp     int64    `json:"timestamp"`                // Unix milliseconds
	Error         *failure `json:"error,omitempty"`
}

// Events as lines of JSON, each with one more LF behind it, sent at once.
type stream struct {
	lock sync.Mutex
	w    http.ResponseWriter
	gone bool
}

func newStream(w http.ResponseWriter) *stream {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	w.Header().Set("X-Accel-Buffering", "no")
	return &stream{w: w}
}

// A client that is gone is not told, and its command not ended.
func (s *stream) send(e event) {
	e.Timestamp = time.Now().UnixMilli()
	text, err := json.Marshal(e)
	if err != nil {
		return
	}
	s.lock.Lock()
	defer s.lock.Unlock()
	if s.gone {
		return
	}
	_, err = s.w.Write(append(text, '\n', '\n'))
	if err == nil {
		err = http.NewResponseController(s.w).Flush()
	}
	s.gone = err != nil
}

// The lines of a file that grows.
type tail struct {
	path          string
	keepsLineEnds bool
	pending       []byte
	afterCR       bool
}

// Gives each line, and at the end what is left of one.
func (t *tail) follow(ended <-chan struct{}, give func(string)) {
	file, err := os.Open(t.path)
	if err != nil {
		return
	}
	defer file.Close()
	for {
		last := false
		select {
		case <-ended:
			last = true
		case <-time.After(tailStep):
		}
		content, err := io.ReadAll(file)
		if err != nil {
			return
		}
		t.pending = append(t.pending, content...)
		t.lines(give)
		if last {
			if len(t.pending) > 0 {
				give(string(t.pending))
			}
			return
		}
	}
}

func (t *tail) lines(give func(string)) {
	for len(t.pending) > 0 {
		if !t.keepsLineEnds && t.afterCR && t.pending[0] == '\n' {
			t.pending, t.afterCR = t.pending[1:], false // CRLF is one end
			continue
		}
		at := bytes.IndexAny(t.pending, "\r\n")
		if at < 0 {
			return
		}
		line, end := t.pending[:at], t.pending[at]
		t.afterCR = end == '\r'
		switch {
		case t.keepsLineEnds:
			give(string(t.pending[:at+1]))
		case len(line) == 0:
			give("\n")
		default:
			give(string(line))
		}
		t.pending = t.pending[at+1:]
	}
}

func randomID() string {
	var id [16]byte
	_, _ = rand.Read(id[:])
	return hex.EncodeToString(id[:])
}
