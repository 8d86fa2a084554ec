package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	keepAlive     = 3 * time.Second
	interruptStep = 50 * time.Millisecond
	interruptWait = 3 * time.Second
)

type commandRequest struct {
	Command string            `json:"command"`
	Argv    []string          `json:"argv"`
	Cwd     string            `json:"cwd"`
	Timeout int64             `json:"timeout"` // milliseconds
	Envs    map[string]string `json:"envs"`
	UID     *uint32           `json:"uid"`
	GID     *uint32           `json:"gid"`
}

// A command that runs or ran. Fields below the lock change.
type command struct {
	id      string
	process *exec.Cmd
	outputs [2]string // of stdout and stderr
	started time.Time
	ended   chan struct{}

	lock     sync.Mutex
	finished time.Time
	err      error
}

type registry struct {
	lock     sync.Mutex
	commands map[string]*command
}

func (r *registry) add(c *command) {
	r.lock.Lock()
	defer r.lock.Unlock()
	if r.commands == nil {
		r.commands = map[string]*command{}
	}
	r.commands[c.id] = c
}

func (r *registry) find(id string) *command {
	r.lock.Lock()
	defer r.lock.Unlock()
	return r.commands[id]
}

func (s *server) runCommand(w http.ResponseWriter, r *http.Request) {
	var request commandRequest
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
		fail(w, http.StatusBadRequest, "INVALID_REQUEST_BODY", "error parsing request, MAYBE invalid body format. %v", err)
		return
	}
	argv := request.Argv
	if !s.hasArgv {
		argv = nil
	}
	if (len(argv) > 0) == (request.Command != "") { // one of the two
		fail(w, http.StatusBadRequest, "INVALID_REQUEST_BODY", "error validating request, invalid value: command")
		return
	}
	if request.Timeout < 0 || request.GID != nil && request.UID == nil {
		fail(w, http.StatusBadRequest, "INVALID_REQUEST_BODY", "error validating request, invalid value: timeout, uid or gid")
		return
	}
	if request.Cwd != "" {
		if info, err := os.Stat(request.Cwd); err != nil || !info.IsDir() {
			fail(w, http.StatusBadRequest, "INVALID_REQUEST_BODY", "cwd %q is no directory", request.Cwd)
			return
		}
	}
	if len(argv) == 0 {
		shell := "sh"
		if _, err := exec.LookPath("bash"); err == nil {
			shell = "bash"
		}
		argv = []string{shell, "-c", request.Command}
	}
	stream := newStream(w)
	c := &command{id: randomID(), ended: make(chan struct{}), started: time.Now()}
	s.commands.add(c)
	stream.send(event{Type: "init", Text: c.id})
	stream.send(event{Type: "ping", Text: "pong"})
	if err := s.start(c, argv, &request); err != nil {
		close(c.ended)
		stream.send(event{Type: "error", Error: &failure{"CommandExecError", err.Error(), []string{err.Error()}}})
		return
	}
	s.follow(c, stream)
	stream.send(terminal(c))
	time.Sleep(s.linger)
}

// Starts a command with its streams in files. It goes on when its client is gone.
func (s *server) start(c *command, argv []string, request *commandRequest) error {
	process := exec.Command(argv[0], argv[1:]...)
	process.Dir = request.Cwd
	process.Env = os.Environ()
	for name, value := range request.Envs {
		process.Env = append(process.Env, name+"="+value)
	}
	process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if request.UID != nil {
		credential := &syscall.Credential{Uid: *request.UID, Gid: *request.UID}
		if request.GID != nil {
			credential.Gid = *request.GID
		}
		process.SysProcAttr.Credential = credential
	}
	for i, name := range []string{"stdout", "stderr"} {
		c.outputs[i] = filepath.Join(s.outputFolder, c.id+"."+name)
		file, err := os.OpenFile(c.outputs[i], os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o644)
		if err != nil {
			return err
		}
		defer file.Close()
		if i == 0 {
			process.Stdout = file
		} else {
			process.Stderr = file
		}
	}
	if err := process.Start(); err != nil {
		return err
	}
	c.process = process
	var timer *time.Timer
	if request.Timeout > 0 {
		timer = time.AfterFunc(time.Duration(request.Timeout)*time.Millisecond, func() { c.signal(syscall.SIGKILL) })
	}
	go func() {
		err := process.Wait()
		if timer != nil {
			timer.Stop()
		}
		c.lock.Lock()
		c.finished, c.err = time.Now(), err
		c.lock.Unlock()
		close(c.ended)
	}()
	return nil
}

// Sends what a command prints, until it has ended.
func (s *server) follow(c *command, stream *stream) {
	over := make(chan struct{})
	var tails sync.WaitGroup
	for i, kind := range []string{"stdout", "stderr"} {
		tail := tail{path: c.outputs[i], keepsLineEnds: s.keepsLineEnds}
		tails.Go(func() {
			tail.follow(c.ended, func(text string) { stream.send(event{Type: kind, Text: text}) })
		})
	}
	go func() {
		tails.Wait()
		close(over)
	}()
	ticker := time.NewTicker(keepAlive)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			stream.send(event{Type: "ping", Text: "pong"})
		case <-over:
			return
		}
	}
}

func (c *command) signal(number syscall.Signal) {
	_ = syscall.Kill(-c.process.Process.Pid, number)
}

// The decimal exit status, -1 for a death by signal.
func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	default:
		return -1
	}
}

func terminal(c *command) event {
	c.lock.Lock()
	defer c.lock.Unlock()
	if c.err == nil {
		return event{Type: "execution_complete", ExecutionTime: c.finished.Sub(c.started).Milliseconds()}
	}
	return event{Type: "error", Error: &failure{"CommandExecError", strconv.Itoa(exitCode(c.err)), []string{c.err.Error()}}}
}

func (s *server) interruptCommand(w http.ResponseWriter, r *http.Request) {
	id := r.URL.Query().Get("id")
	if id == "" {
		fail(w, http.StatusBadRequest, "MISSING_QUERY", "missing query parameter 'id'")
		return
	}
	c := s.commands.find(id)
	if c == nil || c.process == nil || over(c) {
		fail(w, http.StatusInternalServerError, "RUNTIME_ERROR", "error interruptting code context. no such process %s", id)
		return
	}
	c.signal(syscall.SIGTERM)
	for end := time.Now().Add(interruptWait); time.Now().Before(end); time.Sleep(interruptStep) {
		if over(c) {
			return
		}
	}
	c.signal(syscall.SIGKILL)
	<-c.ended
}

func over(c *command) bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

func (s *server) commandStatus(w http.ResponseWriter, r *http.Request) {
	c := s.commands.find(r.PathValue("id"))
	if c == nil {
		fail(w, http.StatusNotFound, "INVALID_REQUEST_BODY", "command not found: %s", r.PathValue("id"))
		return
	}
	body := map[string]any{"id": c.id, "running": !over(c), "started_at": c.started.UTC().Format(time.RFC3339Nano)}
	if over(c) {
		c.lock.Lock()
		defer c.lock.Unlock()
		body["exit_code"] = exitCode(c.err)
		body["finished_at"] = c.finished.UTC().Format(time.RFC3339Nano)
		if c.err != nil {
			body["error"] = fmt.Sprint(c.err)
		}
	}
	answer(w, http.StatusOK, body)
}
