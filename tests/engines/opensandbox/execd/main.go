// A stand-in for OpenSandbox's execd, for tests: the part of its API that cloche uses, byte for byte as the real one
// answers (see the README beside this folder for what it leaves out).
//
//	execd [--current]
//
// Without --current it is execd 1.1.0: lines come without their ends, the stream of a command lingers for a second after
// its last event, /ping wants the token, there is no argv. Other arguments are ignored, as the real one's are when the
// server starts a container of its image.
package main

import (
	"bytes"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
)

const address = "0.0.0.0:44772"

// How the two generations differ.
type generation struct {
	keepsLineEnds bool
	openPing      bool
	hasArgv       bool
	linger        time.Duration
	outputFolder  string
}

var (
	old = generation{linger: time.Second, outputFolder: "/tmp"}
	now = generation{keepsLineEnds: true, openPing: true, hasArgv: true, outputFolder: "/tmp/opensandbox-execd"}
)

type server struct {
	generation
	token    string
	commands registry
}

func main() {
	s := &server{generation: old, token: os.Getenv("EXECD_ACCESS_TOKEN")}
	if slices.Contains(os.Args[1:], "--current") {
		s.generation = now
	}
	if text := os.Getenv("EXECD_API_GRACE_SHUTDOWN"); text != "" && !s.hasArgv {
		var err error
		if s.linger, err = time.ParseDuration(text); err != nil {
			log.Fatalf("EXECD_API_GRACE_SHUTDOWN: %v", err)
		}
	}
	if err := os.MkdirAll(s.outputFolder, 0o700); err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp4", address)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(listener, s.routes()))
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ping", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("POST /command", s.runCommand)
	mux.HandleFunc("DELETE /command", s.interruptCommand)
	mux.HandleFunc("GET /command/status/{id}", s.commandStatus)
	mux.HandleFunc("POST /files/upload", s.uploadFiles)
	mux.HandleFunc("GET /files/download", s.downloadFile)
	mux.HandleFunc("/proxy/{port}/", proxy)
	return s.guarded(mux)
}

// Wants the access token where there is one.
func (s *server) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		given := r.Header.Get("X-EXECD-ACCESS-TOKEN")
		free := s.token == "" || s.openPing && r.URL.Path == "/ping"
		if !free && subtle.ConstantTimeCompare([]byte(given), []byte(s.token)) != 1 {
			answer(w, http.StatusUnauthorized, map[string]string{"error": "Unauthorized: invalid or missing header X-EXECD-ACCESS-TOKEN"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// Passes a request on to a port of the sandbox; the server's endpoints lead execd to itself this way.
func proxy(w http.ResponseWriter, r *http.Request) {
	// Else this server closes the request's body with the first byte of the answer, while the transport may still look for
	// its end, and that cuts the answer off. Told to leave the body alone (EnableFullDuplex), it mixes what is left of it with
	// the next request on the same connection, which then has no answer.
	body, err := io.ReadAll(r.Body)
	if err != nil {
		fail(w, http.StatusBadGateway, "UNKNOWN", "%v", err)
		return
	}
	r.Body, r.ContentLength, r.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
	if len(body) == 0 {
		r.Body = http.NoBody
	}
	target := &url.URL{Scheme: "http", Host: net.JoinHostPort("127.0.0.1", r.PathValue("port"))}
	forward := httputil.ReverseProxy{
		FlushInterval: -1,
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(target)
			p.Out.URL.Path = strings.TrimPrefix(r.URL.Path, "/proxy/"+r.PathValue("port"))
			p.Out.URL.RawPath = ""
		},
		Transport: &http.Transport{DisableKeepAlives: true},
	}
	forward.ServeHTTP(w, r)
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		log.Print(err)
	}
}

func fail(w http.ResponseWriter, status int, code, format string, words ...any) {
	answer(w, status, map[string]string{"code": code, "message": fmt.Sprintf(format, words...)})
}
