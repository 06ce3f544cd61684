import Foundation

enum ServerError: LocalizedError {
    case didNotStart
    case refused(Int)
    case failed(String)

    var errorDescription: String? {
        switch self {
        case .didNotStart: return "The server did not start."
        case .refused(let status): return "The server answered with status \(status)."
        case .failed(let message): return message
        }
    }
}

/// One piece of a streamed answer.
private struct Chunk: Decodable {
    struct Choice: Decodable { let delta: Delta }
    struct Delta: Decodable { let content: String? }
    struct Failure: Decodable { let message: String }

    let choices: [Choice]?
    let error: Failure?
}

/// The server that is part of the app's bundle: starts it, streams answers, stops it.
actor Server {
    private let process = Process()
    /// Other programs on this Mac can reach the port, but do not know the key.
    private let key = UUID().uuidString
    private var address: URL?

    /// Returns once the server is ready, which takes as long as it loads the model.
    func start(python: URL, model: URL) async throws {
        let output = Pipe()
        process.executableURL = python
        process.arguments = ["-m", "mlx_mtp.server", "--model", model.path, "--port", "0"]
        // Not as an argument, which other programs could read.
        process.environment = ProcessInfo.processInfo.environment.merging(["MLX_MTP_API_KEY": key]) { _, new in new }
        process.standardOutput = output
        try process.run()
        // The only line on its standard output. If it ends before, so does the loop.
        for try await line in output.fileHandleForReading.bytes.lines where line.hasPrefix("http://") {
            address = URL(string: line.trimmingCharacters(in: .whitespaces))
            break
        }
        try await waitUntilHealthy()
    }

    private func waitUntilHealthy() async throws {
        for _ in 0..<50 where process.isRunning {
            if let (_, response) = try? await URLSession.shared.data(for: makeRequest("health")),
                (response as? HTTPURLResponse)?.statusCode == 200
            {
                return
            }
            try await Task.sleep(nanoseconds: 200_000_000)
        }
        throw ServerError.didNotStart
    }

    private func makeRequest(_ path: String) throws -> URLRequest {
        guard let address = address else { throw ServerError.didNotStart }
        var request = URLRequest(url: address.appendingPathComponent(path))
        request.setValue("Bearer \(key)", forHTTPHeaderField: "Authorization")
        // Between two pieces of data; the server sends comments while it has nothing to say.
        request.timeoutInterval = 120
        return request
    }

    /// The answer, piece by piece. Whoever stops listening closes the connection, which ends the generation.
    func answer(to question: String) throws -> AsyncThrowingStream<String, Error> {
        var request = try makeRequest("v1/chat/completions")
        request.httpMethod = "POST"
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        let body: [String: Any] = [
            "messages": [["role": "user", "content": question]],
            "stream": true,
            "max_tokens": 500,
        ]
        request.httpBody = try JSONSerialization.data(withJSONObject: body)
        let ready = request
        return AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await Server.stream(ready) { text in continuation.yield(text) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private static func stream(_ request: URLRequest, show: (String) -> Void) async throws {
        let (bytes, response) = try await URLSession.shared.bytes(for: request)
        let status = (response as? HTTPURLResponse)?.statusCode ?? 0
        guard status == 200 else { throw ServerError.refused(status) }
        // What does not begin so is a comment.
        for try await line in bytes.lines where line.hasPrefix("data: ") {
            let data = line.dropFirst("data: ".count)
            if data == "[DONE]" { return }
            let chunk = try JSONDecoder().decode(Chunk.self, from: Data(data.utf8))
            if let failure = chunk.error { throw ServerError.failed(failure.message) }
            if let text = chunk.choices?.first?.delta.content { show(text) }
        }
    }

    /// Asks the server to end, and ends it if it has not after ten seconds.
    func stop() async {
        guard process.isRunning else { return }
        process.terminate()
        for _ in 0..<100 where process.isRunning {
            try? await Task.sleep(nanoseconds: 100_000_000)
        }
        if process.isRunning { kill(process.processIdentifier, SIGKILL) }
    }
}
